"""Figures from the literature, each with its source, how it was learned and which checkpoint it is of.

They come from TOML files in folders that packages name in the entry-point group ``wmdd.published``: a function that
returns the folder. They are shown in columns of their own, and never enter a mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources.abc import Traversable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wmdd.errors import InputError
from wmdd.storage.files import read_toml

Percent = Annotated[float, Field(ge=0, le=100)]
Ipc = Annotated[str, Field(pattern=r"^([1-9]\d*|all)$")]


class PublishedRow(BaseModel):
    """The figures of one method from one source."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str
    """As its authors call it."""
    source: str
    """Where the figure stands, in words that find it."""
    table: str | None = None
    """Number of its table there; None where it was not checked."""
    url: Annotated[str, Field(pattern=r"^https://")] | None = None
    """Address of the paper or page."""
    mark: Literal["author", "second-hand", "memory"]
    """Read in the authors' own pages, quoted by others, or remembered."""
    top1: Annotated[dict[Ipc, Percent], Field(min_length=1)]
    """Top-1 in percent by images per class; ``all`` is the whole training set."""
    spread: dict[Ipc, Percent] = {}
    """What stands behind ± in the source, in points."""
    network: str = "resnet18"
    """The student."""
    regime: Literal["hard", "soft"] = "soft"
    """Labels that the student learned from."""
    resolution: int | None = None
    """Height and width in pixels; None where the source was not checked for it."""
    checkpoint: str | None = None
    """Which checkpoint the figure is of; None where it is not known."""
    study: Literal["main", "ablation"] = "main"
    """A comparison of methods, or of the parts of one."""
    ours: str | None = None
    """Name of the method in this package's registry, if it is there."""
    note: str | None = None
    """What one must know to compare it."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    classes: Annotated[int, Field(ge=2)]
    entry: Annotated[tuple[PublishedRow, ...], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class PublishedAccuracy:
    """One published accuracy."""

    dataset: str
    classes: int
    """Number of classes that were told apart."""
    ipc: int | None
    """None: the whole training set."""
    top1: float
    """A fraction."""
    spread: float | None
    """What stands behind ± in the source, a fraction."""
    entry: PublishedRow


def load() -> list[PublishedAccuracy]:
    """Read all published figures of the installed packages.

    Raises:
        InputError: a file is wrong; the message names the file, the entry and the key.
    """
    points = sorted(entry_points(group="wmdd.published"), key=lambda point: point.name)
    return [figure for point in points for figure in read(point.load()())]


def read(folder: Traversable) -> Iterator[PublishedAccuracy]:
    """Yield the figures of the TOML files in a folder, in the order of their names.

    Raises:
        InputError: as for ``load``.
    """
    for place in sorted(folder.iterdir(), key=lambda place: place.name):
        if not place.name.endswith(".toml"):
            continue
        try:
            found = _File.model_validate(read_toml(place, place.name))
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise InputError(f"published figures, {place.name}: {at}: {first['msg']}") from None
        for number, entry in enumerate(found.entry):
            if unknown := sorted(entry.spread.keys() - entry.top1.keys()):
                at = f"entry.{number}.spread.{unknown[0]}"
                raise InputError(f"published figures, {place.name}: {at}: top1 has no figure for this IPC")
            for ipc, percent in entry.top1.items():
                spread = entry.spread.get(ipc)
                images = None if ipc == "all" else int(ipc)
                half = None if spread is None else spread / 100
                yield PublishedAccuracy(found.dataset, found.classes, images, percent / 100, half, entry)
