"""A protocol: methods × IPC × distillation seeds × student seeds under one student recipe, as a table of runs."""

from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wmdd import methods, pipeline
from wmdd.config import Config, Positive, load_config
from wmdd.console import progress
from wmdd.errors import InputError, nearest
from wmdd.files import read_toml


class Protocol(BaseModel):
    """What is compared; the recipe of the students is the config's, the same for all."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name of the protocol; results lie in ``runs/NAME`` unless ``--out`` says otherwise."""
    config: str
    """Preset, preset with variants or TOML file that all cells start from."""
    overrides: tuple[str, ...] = ()
    """``key=value`` strings applied to it."""
    methods: tuple[str, ...] = Field(("wmdd", "random"), min_length=1)
    """Methods of the registry, compared at the same IPC by the same students."""
    ipc: tuple[Positive, ...] = Field((1, 10), min_length=1)
    """Images per class."""
    distillation_seeds: Positive = 3
    """Independent distillations of each method; seeds 0 to N−1."""
    student_seeds: Annotated[int, Field(ge=1)] = 3
    """Students of each distilled set, architecture and label regime; seeds 0 to N−1."""


@dataclass(frozen=True)
class Cell:
    """One run of the protocol: one IPC and distillation seed, all methods."""

    folder: Path
    config: Config


def load_protocol(source: str) -> Protocol:
    """Read a shipped protocol by name, or a TOML file.

    Raises:
        InputError: no such protocol, or a key or value that is wrong.
    """
    shipped = resources.files("bench") / "protocols"
    names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir())
    if source.endswith(".toml"):
        place: Traversable = Path(source)
    elif source in names:
        place = shipped / f"{source}.toml"
    else:
        raise InputError(f"{source}: no protocol of that name; {nearest(source, names)} (a file's name ends in .toml)")
    try:
        return Protocol.model_validate(read_toml(place, source))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        hint = nearest(where, list(Protocol.model_fields)) if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{source}: {where}: {hint}") from None


def cells(protocol: Protocol, out: Path) -> list[Cell]:
    """Return the runs of a protocol: every method but the first is a baseline of the first one's run.

    Raises:
        InputError: a config or a method is wrong.
    """
    first, *others = protocol.methods
    made = []
    for ipc in protocol.ipc:
        for seed in range(protocol.distillation_seeds):
            varied = [f"ipc={ipc}", f"seed={seed}", f"student.seeds={protocol.student_seeds}", f"method={first}"]
            config = load_config(protocol.config, [*protocol.overrides, *varied])
            student = config.student.model_copy(update={"baselines": tuple(others)})
            config = config.model_copy(update={"name": protocol.name, "student": student})
            made.append(Cell(out / f"ipc-{ipc:03d}" / f"seed-{seed:03d}", config))
    for method in protocol.methods:
        methods.create(made[0].config, method)
    return made


def run(protocol: Protocol, out: Path) -> list[Path]:
    """Run what is missing of a protocol on this machine; teachers, statistics and finished cells are shared.

    Returns:
        the run folders.
    """
    table = cells(protocol, out)
    with progress(f"protocol {protocol.name}", len(table), "runs") as advance:
        for cell in table:
            pipeline.run(cell.config, cell.folder, share=pipeline.Share(("teacher", "distill", "students")))
            advance(1)
    return [cell.folder for cell in table]
