"""The dataset of a run: its images are selected and checked before any work, and decoded when needed."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wmdd.config.schema import DECIDES, Config, DataConfig
from wmdd.data import listing_build
from wmdd.data.decode_checks import chunks, decode_verdicts, decoding_faults
from wmdd.data.decoding import decoders, in_order
from wmdd.data.listing import Catalogue, Fault, ListedCatalogue, listed_in_memory, open_listing
from wmdd.data.pixels import fit
from wmdd.data.shards import Shards
from wmdd.data.sources import SPLITS, Split, Tree, in_memory, open_source, tree_of
from wmdd.errors import InputError, Interrupted, WmddError, nearest
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.ranks import Ranks
from wmdd.storage.files import digest

Positions = Iterable[int] | np.ndarray
"""Positions of images in an image set"""


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """The images of one split that a run uses, listed but not decoded: ``C`` classes, ``N`` images.

    The images of a class are contiguous and in the order of their base names.
    """

    catalogue: Catalogue
    split: Split
    config: DataConfig
    classes: tuple[str, ...]
    """Names of the classes; a class's position is its index."""
    places: np.ndarray
    """Position of each class in the catalogue: int64 [C]"""
    starts: np.ndarray
    """Position of the first image of each class, and the end of the last: int64 [C + 1]"""
    left_out: Mapping[int, np.ndarray]
    """Unusable rows of each class, by class index; most classes have no entry"""
    held_out: int = 0
    """Number of held-out images of each class"""
    holdout: bool = False
    """Whether this set is the hold-out, or the remaining images"""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {len(self.classes)} classes)"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, channels, height and width of the decoded images."""
        return len(self), self.config.channels, self.config.resolution, self.config.resolution

    @property
    def nbytes(self) -> int:
        """Size of the decoded images in bytes."""
        return math.prod(self.shape)

    @property
    def labels(self) -> torch.Tensor:
        """Class index of each image, computed on each call: int64 [N]."""
        return torch.from_numpy(np.repeat(np.arange(len(self.classes), dtype=np.int64), np.diff(self.starts)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all images, created on each call.  Use it only for few images: each name takes 100 bytes."""
        return tuple(self.name(position) for position in range(len(self)))

    def name(self, position: int) -> str:
        """Return the name of an image, such as ``train/cat/001.png`` or ``train/17``."""
        return self.catalogue.name(self.split, *self._place(position))

    def where(self, position: int) -> str:
        """Return the location of an image, for error messages."""
        return self.catalogue.where(self.split, *self._place(position))

    def read(self, position: int) -> Image.Image:
        """Return an image as it is stored (packed data: resized and cropped).

        Raises:
            BrokenImage: the image cannot be decoded; the message names the file.
        """
        return self.catalogue.read(self.split, *self._place(position))

    def of_class(self, index: int) -> range:
        """Return the positions of the images of one class.

        Raises:
            IndexError: the class does not exist.
        """
        if not 0 <= index < len(self.classes):
            raise IndexError(f"class {index} of {len(self.classes)}")
        return range(int(self.starts[index]), int(self.starts[index + 1]))

    def first(self, count: int) -> "ImageSet":
        """Return the first ``count`` images; later classes are empty."""
        return replace(self, starts=np.minimum(self.starts, count))

    def decode(self, indices: Positions) -> torch.Tensor:
        """Decode images in this process: uint8 [n, channels, resolution, resolution].

        Raises:
            BrokenImage: an image cannot be decoded; the message names the file.
            InputError: an image differs from its listing.
        """
        chosen = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, dtype=np.int64)
        owners = np.searchsorted(self.starts, chosen, side="right") - 1
        rows = chosen - self.starts[owners]
        # Without left-out images, a row is the position within the class.
        for owner in set(owners.tolist()) if self.held_out else self.left_out.keys() & set(owners.tolist()):
            own = np.flatnonzero(owners == owner)
            rows[own] = self._rows(owner)[rows[own]]
        places = self.places[owners]
        if isinstance(self.catalogue, Shards):
            return self.catalogue.pixels(self.split, places, rows)
        side = self.config.resolution
        images = torch.empty((len(chosen), self.config.channels, side, side), dtype=torch.uint8)
        for target, (place, row) in enumerate(zip(places.tolist(), rows.tolist(), strict=True)):
            images[target] = fit(self.catalogue.read(self.split, place, row), self.config)
        return images

    def batches(self, batches: Sequence[Sequence[int]], workers: int) -> Iterator[torch.Tensor]:
        """Decode batches in the given order, ahead of use, in ``workers`` processes (0: in this process).

        The result and the global random state do not depend on ``workers``.  Every call starts new processes, so one
        long stream is cheaper than many short streams.

        Raises:
            BrokenImage: an image cannot be decoded; the message names the file.
            InputError: an image differs from its listing.
            WmddError: a worker process died.
        """
        return in_order(self.decode, batches, workers)

    def decoders(
        self, workers: int, ahead: int = 2
    ) -> AbstractContextManager[Callable[[Sequence[Positions]], Iterator[torch.Tensor]]]:
        """Return ``batches`` as a function, with processes that live as long as the context (``decoding.decoders``)."""
        return decoders(self.decode, workers, ahead)

    @property
    def is_decoded(self) -> bool:
        """Whether the images are stored as pixels, so that reading them needs no decoder."""
        return isinstance(self.catalogue, Shards) or in_memory(self.config)

    def _place(self, position: int) -> tuple[int, int]:
        """Return the position of an image's class in the catalogue, and the image's row in the class."""
        if not 0 <= position < len(self):
            raise IndexError(f"image {position} of {len(self)}")
        owner = int(np.searchsorted(self.starts, position, side="right")) - 1
        return int(self.places[owner]), int(self._rows(owner)[position - self.starts[owner]])

    def _rows(self, index: int) -> np.ndarray:
        """Return the rows of one class that belong to this set: int64 [n]."""
        count = int(self.catalogue.counts(self.split)[self.places[index]])
        rows = np.delete(np.arange(count), self.left_out.get(index, ()))
        held = _held_out(len(rows), self.held_out)
        return rows[held] if self.holdout else np.delete(rows, held)


@dataclass(frozen=True)
class Dataset:
    """The dataset of a run."""

    train: ImageSet
    """Training images to distill."""
    holdout: ImageSet | None
    """Held-out training images for the choice of a recipe; None if ``data.holdout_per_class`` is 0."""
    test: ImageSet
    classes: tuple[str, ...]
    all_classes: tuple[str, ...]
    """Names of all classes of the dataset; ``classes`` is a selection of them."""
    fingerprint: str
    """SHA-256 over the identity of the images and their decoding; it does not depend on their folder."""
    skipped: tuple[str, ...]
    """Names of the unreadable files that are left out."""

    @property
    def validation(self) -> ImageSet:
        """The validation images: the hold-out if there is one, else the test set."""
        return self.test if self.holdout is None else self.holdout


def load_dataset(config: DataConfig, workers: int = 0, ranks: Ranks | None = None, refresh: bool = False) -> Dataset:
    """Load the images of the selected classes from the listing of the dataset; create the listing if it is missing.

    Listing checks every image of these classes.  With ``on_error="skip"`` it also decodes each image, and leaves out
    unusable images.  Rank 0 does this work; the other ranks read the result.

    Args:
        config: data section of the config.
        workers: number of processes that decode for ``on_error="skip"``.
        ranks: ranks that load the dataset together (all must call); None: this process alone.
        refresh: whether to list the images again.

    Raises:
        InputError: the dataset, a class or an image is missing or unusable; the message names it.
        Interrupted: a stop was requested while images were listed.
    """
    catalogue = _catalogue(config, workers, ranks, refresh)
    classes = _choose(catalogue.classes, config)
    known = {name: place for place, name in enumerate(catalogue.classes)}
    places = np.array([known[name] for name in classes], dtype=np.int64)
    faults = {split: _faults_of(catalogue, split, places, config.on_error == "skip") for split in SPLITS}
    found = [
        (split, int(places[index]), int(row), fault)
        for split in SPLITS
        for index, rows in sorted(faults[split].items())
        for row, fault in sorted(rows.items())
    ]
    if found and config.on_error == "fail":
        total = sum(int(catalogue.counts(split)[places].sum()) for split in SPLITS)
        examples = [(catalogue.where(split, place, row), fault.reason) for split, place, row, fault in found[:3]]
        raise InputError(_complaint(examples, len(found), total))
    held = config.holdout_per_class
    make = partial(image_set, catalogue, config, classes, places, faults)
    train, test = make("train", held), make("test")
    return Dataset(
        train,
        make("train", held, True) if held else None,
        test,
        classes,
        catalogue.classes,
        _fingerprint(config, catalogue, places, faults, classes),
        tuple(catalogue.name(split, place, row) for split, place, row, _ in found),
    )


def _catalogue(config: DataConfig, workers: int, ranks: Ranks | None, refresh: bool) -> Catalogue:
    """Return the catalogue of the dataset.  Only rank 0 reads the dataset's folders and files."""
    if config.packed:
        shards = Shards(Path(config.packed).expanduser(), config)
        if ranks is None or ranks.main:
            shards.check(_choose(shards.classes, config))
        return shards
    if in_memory(config):
        source = open_source(config)
        return listed_in_memory(source, source.classes("train"))
    found: dict[str, str] = {}
    if ranks is None or ranks.main:
        try:
            found = _listed(config, workers, refresh)
        except Interrupted:
            raise
        except WmddError as error:
            if ranks is None or ranks.size == 1:
                raise
            found = {"error": str(error), "input": "yes" if isinstance(error, InputError) else ""}
    found = found if ranks is None else ranks.broadcast_from_main(found)
    if "error" in found:
        raise (InputError if found["input"] else WmddError)(found["error"])
    return ListedCatalogue(tree_of(found["format"], Path(found["root"])), open_listing(Path(found["listing"])))


def _listed(config: DataConfig, workers: int, refresh: bool) -> dict[str, str]:
    """Return format, root and listing file of the dataset's tree."""
    tree = open_source(config)
    if not isinstance(tree, Tree):
        raise TypeError(f"{type(tree).__name__} is listed in memory")
    names, test = tree.classes("train"), set(tree.classes("test"))
    for missing, here, there in (
        (set(names) - test, "training", "validation"),
        (test - set(names), "validation", "training"),
    ):
        if missing:
            raise InputError(f"{config.source}: class {min(missing)!r} has {here} images but no {there} images")
    verdicts = partial(decode_verdicts, workers) if config.on_error == "skip" else None
    path = listing_build.obtain(tree, _choose(names, config), verdicts, refresh)
    return {"format": tree.format, "root": str(tree.root), "listing": str(path)}


def image_set(
    catalogue: Catalogue,
    config: DataConfig,
    classes: tuple[str, ...],
    places: np.ndarray,
    faults: Mapping[Split, Mapping[int, Mapping[int, Fault]]],
    split: Split,
    held_out: int = 0,
    holdout: bool = False,
) -> ImageSet:
    """Return the images of one split.

    Raises:
        InputError: a class has no images left, or too few for the hold-out.
    """
    left_out = {index: np.array(sorted(rows)) for index, rows in faults[split].items()}
    counts = catalogue.counts(split)[places]
    for index, rows in left_out.items():
        counts[index] -= len(rows)
    if not counts.all():
        raise InputError(f"class {classes[int(counts.argmin())]!r}: none of its {split} images can be read")
    if held_out and held_out >= counts.min():
        name, count = classes[int(counts.argmin())], counts.min()
        raise InputError(
            f"data.holdout_per_class={held_out}: class {name!r} has {count} training images; one must remain"
        )
    own = np.full(len(classes), held_out) if holdout else counts - held_out
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(own)])
    return ImageSet(catalogue, split, config, classes, places, starts, left_out, held_out, holdout)


def _fingerprint(
    config: DataConfig,
    catalogue: Catalogue,
    places: np.ndarray,
    faults: Mapping[Split, Mapping[int, Mapping[int, Fault]]],
    classes: tuple[str, ...],
) -> str:
    """Return the digest of the selected classes' digests and of the settings for decoding and splitting."""
    images: dict[str, list[str]] = {}
    for split in SPLITS:
        images[split] = [row.tobytes().hex() for row in catalogue.digests(split)[places]]
        for index, left_out in faults[split].items():
            rows = catalogue.rows(split, int(places[index]))
            kept = (row for row in range(len(rows)) if row not in left_out)
            images[split][index] = rows.digest_of(kept).hex()
    keys = {key.removeprefix("data.") for key, what in DECIDES.items() if what == "data"} - {"classes"}
    settings = config.model_dump(mode="json", include=keys, exclude_defaults=True)
    return digest(settings | {"classes": classes, "images": images})


def _faults_of(catalogue: Catalogue, split: Split, places: np.ndarray, decoded: bool) -> dict[int, Mapping[int, Fault]]:
    """Return the faults of the selected classes by index and row.  ``decoded``: include faults found by decoding."""
    indices = {int(place): index for index, place in enumerate(places)}
    found = {
        indices[place]: {row: fault for row, fault in rows.items() if decoded or not fault.decoded}
        for place, rows in catalogue.faults(split).items()
        if place in indices
    }
    return {index: rows for index, rows in found.items() if rows}


def check_files(config: DataConfig, workers: int, refresh: bool = False) -> list[tuple[str, str]]:
    """Decode every image of the selected classes, and return (file, reason) for each unreadable image.

    A damaged JPEG counts as readable if its decoder repairs it, as in a run.

    Args:
        config: data section of the config.
        workers: number of processes that decode; 0: this process decodes.
        refresh: whether to list the images again.

    Raises:
        InputError: the dataset or a class is missing, or a file differs from its listing.
    """
    catalogue = _catalogue(config.replace({"on_error": "fail"}), workers, None, refresh)
    classes = _choose(catalogue.classes, config)
    if isinstance(catalogue, Shards) and (damaged := catalogue.damaged(classes)):
        return damaged
    known = {name: place for place, name in enumerate(catalogue.classes)}
    places = np.array([known[name] for name in classes], dtype=np.int64)
    faults = {
        (split, int(places[index]), row): fault.reason
        for split in SPLITS
        for index, rows in sorted(_faults_of(catalogue, split, places, False).items())
        for row, fault in sorted(rows.items())
    }
    every = [chunk for split in SPLITS for chunk in chunks(catalogue, split, places.tolist())]
    faults |= decoding_faults(catalogue, every, workers)
    return [(catalogue.where(*place), reason) for place, reason in faults.items()]


def _choose(names: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """Return the classes that ``config.classes`` selects from the classes of the dataset."""
    wanted = config.classes
    if wanted is None:
        return tuple(names)
    if isinstance(wanted, int):
        return tuple(names[_part(names, 0, wanted, f"data.classes={wanted}")])
    if isinstance(wanted, str):
        positions = None if wanted in names else re.fullmatch(r"(\d*):(\d*)", wanted)
        if positions:
            start, end = positions.groups()
            chosen = _part(names, int(start or 0), int(end or len(names)), f"data.classes={wanted!r}")
            return tuple(names[chosen])
        wanted = (wanted,)
    if not wanted:
        raise InputError("data.classes: the list is empty; name at least one class")
    known = set(names)
    seen = set()
    for name in wanted:
        if name not in known:
            # A list of a thousand names would hide the message.
            few = len(names) <= 20 or nearest(name, list(names)).startswith("did")
            hint = nearest(name, list(names)) if few else f"there are {len(names)}, {names[0]!r} to {names[-1]!r}"
            raise InputError(f"data.classes: no class {name!r}; {hint}")
        if name in seen:
            raise InputError(f"data.classes: {name!r} is given twice")
        seen.add(name)
    return tuple(wanted)


def _part(names: Sequence[str], start: int, end: int, given: str) -> slice:
    if end > len(names):
        raise InputError(f"{given}: there are only {len(names)} classes")
    if start >= end:
        raise InputError(f"{given}: selects no class")
    return slice(start, end)


def _complaint(examples: Sequence[tuple[str, str]], count: int, total: int) -> str:
    named = ", ".join(f"{where} ({reason})" for where, reason in examples[:3])
    more = ", ..." if count > 3 else ""
    return (
        f"{count} of {total} images cannot be read: {named}{more}; "
        "data.on_error=skip leaves them out, `wmdd data check` lists them all"
    )


def _held_out(images: int, count: int) -> np.ndarray:
    """Return the positions of a class's held-out images: evenly spaced, for any seed; int64 [count]."""
    return (2 * np.arange(count) + 1) * images // max(2 * count, 1)


_READ_BATCH = 256
"""Images that need no decoding read between two checks of the stop request."""
_DECODE_BATCH = 16
"""Images decoded between two checks of the stop request: few, because a large photograph takes long to decode."""


def decode_all(images: ImageSet, config: Config, title: str, stop: Callable[[], bool] = lambda: False) -> Tensor:
    """Return all images of a split, decoded by worker processes: uint8 [N, channels, H, W].

    Raises:
        Interrupted: a stop was requested; it is checked between batches.
    """
    out = torch.empty(images.shape, dtype=torch.uint8)
    done = 0
    for batch in decoded_in_order(images, config, title, stop):
        out[done : done + len(batch)] = batch
        done += len(batch)
    return out


def decoded_in_order(
    images: ImageSet, config: Config, title: str, stop: Callable[[], bool] = lambda: False
) -> Iterator[Tensor]:
    """Yield all images of a split in order, some at a time, decoded by worker processes: uint8 [n, channels, H, W].

    Raises:
        Interrupted: a stop was requested; it is checked between batches.
    """
    # Pixels are copied faster than processes hand them over.
    size, workers = (_READ_BATCH, 0) if images.is_decoded else (_DECODE_BATCH, config.compute.workers)
    plan = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    with progress(title, len(images), "images") as advance:
        for chosen, batch in zip(plan, images.batches(plan, workers), strict=True):
            if stop():
                raise Interrupted(f"stopped while {title}")
            yield batch
            advance(len(chosen))
