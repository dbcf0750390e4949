"""The images of a run: chosen, listed and checked before any work, decoded when they are needed."""

import atexit
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from wmdd import signals
from wmdd.config import Data
from wmdd.console import progress
from wmdd.errors import InputError, Interrupted, WmddError, nearest
from wmdd.files import digest, read_json, write_json
from wmdd.packed import Shards
from wmdd.sources import SPLITS, BrokenImage, Look, Source, Split, Tree, fetch, open_source

__all__ = [
    "BrokenImage",
    "Dataset",
    "ImageSet",
    "check_files",
    "fetch",
    "load_dataset",
    "normalise",
    "pixel_range",
    "quantise",
]

_LOOKERS = 8
"""Threads of the first look, which mostly wait for the disk."""
_CHUNK = 256
"""Files that one thread or process takes at a time."""
_PATIENCE = 30
"""Seconds that a decoding process outlives SIGTERM: as long as SLURM leaves a task it has cancelled."""

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """The images of one split, listed but not decoded.

    The images of a class are contiguous and sorted by name.
    """

    source: Source
    config: Data
    classes: tuple[str, ...]
    """Names of the classes; the position of one is its index."""
    names: tuple[str, ...]
    """Relative name of each image, such as ``train/cat/001.png`` or ``train/17``."""
    labels: torch.Tensor
    """Class index of each image: int64 [N]."""

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {len(self.classes)} classes)"

    def of_class(self, index: int) -> range:
        """Return the positions of the images of one class.

        Raises:
            IndexError: there is no such class.
        """
        if not 0 <= index < len(self.classes):
            raise IndexError(f"class {index} of {len(self.classes)}")
        start, end = torch.searchsorted(self.labels, torch.tensor([index, index + 1])).tolist()
        return range(start, end)

    def decode(self, indices: Iterable[int]) -> torch.Tensor:
        """Decode images in this process: uint8 [n, channels, resolution, resolution].

        Raises:
            BrokenImage: one cannot be decoded; the message names it.
        """
        chosen = [self.names[int(index)] for index in indices]
        if isinstance(self.source, Shards):
            return self.source.images(chosen)
        side = self.config.resolution
        images = torch.empty((len(chosen), self.config.channels, side, side), dtype=torch.uint8)
        for image, name in zip(images, chosen, strict=True):
            image.copy_(_fit(self.source.read(name), self.config))
        return images

    def batches(self, batches: Sequence[Sequence[int]], workers: int) -> Iterator[torch.Tensor]:
        """Decode batch after batch, ahead of use in ``workers`` processes (0: in this one), in the given order.

        The result and the global random state do not depend on ``workers``.  A long stream is cheaper than many short
        ones: the processes start once for each call.

        Raises:
            BrokenImage: an image cannot be decoded; the message names it.
            WmddError: a process died.
        """
        return _in_order(self.decode, batches, workers)


@dataclass(frozen=True)
class Dataset:
    """The images of a run."""

    train: ImageSet
    """What is distilled."""
    holdout: ImageSet | None
    """Training images kept apart to choose recipes on, if ``holdout_per_class`` asks for them."""
    test: ImageSet
    classes: tuple[str, ...]
    all_classes: tuple[str, ...]
    """Those of the whole data set, of which ``classes`` were chosen."""
    fingerprint: str
    """SHA-256 of what identifies the images and their decoding: never of the place where they lie."""
    skipped: tuple[str, ...]
    """Names of the unreadable files that were left out."""

    @property
    def validation(self) -> ImageSet:
        """The images that recipes are judged by: the holdout if there is one, else the test set."""
        return self.test if self.holdout is None else self.holdout


@dataclass(frozen=True)
class _Listing:
    """Images of one split with what the first look told: ``names`` and int64 arrays, all of length N."""

    names: tuple[str, ...]
    labels: np.ndarray
    identities: np.ndarray
    changed: np.ndarray

    def take(self, chosen: np.ndarray) -> "_Listing":
        """Return the images where ``chosen`` (bool [N]) is true."""
        names = tuple(name for name, wanted in zip(self.names, chosen, strict=True) if wanted)
        return _Listing(names, self.labels[chosen], self.identities[chosen], self.changed[chosen])

    def digest(self) -> str:
        return digest([self.names, self.labels.tolist(), self.identities.tolist()])


def load_dataset(config: Data, workers: int = 0) -> Dataset:
    """List the chosen classes and check that every image is there and looks whole.

    With ``on_error="skip"`` every file is also decoded once, so that what is listed is what can be used; the verdict
    is cached until a file changes.

    Args:
        config: which images.
        workers: processes that decode for ``on_error="skip"``.

    Raises:
        InputError: the data set, a class or an image is missing or unusable; the message names it.
    """
    source = _open(config)
    classes = _choose(source, config)
    listings: dict[Split, _Listing] = {}
    faults: dict[str, str] = {}
    for split in SPLITS:
        listings[split], found = _list(source, split, classes)
        faults |= found
    if config.on_error == "skip":
        faults |= _decoding_faults(source, listings, faults, workers)
        listings = {split: _without(listing, faults, classes, split) for split, listing in listings.items()}
    elif faults:
        raise InputError(_complaint(source, faults, sum(len(listing.names) for listing in listings.values())))

    parts: dict[str, _Listing] = {"test": listings["test"]}
    held = _held_out(listings["train"], classes, config.holdout_per_class)
    parts["train"] = listings["train"].take(~held)
    if config.holdout_per_class:
        parts["holdout"] = listings["train"].take(held)
    sets = {
        part: ImageSet(source, config, classes, listing.names, torch.from_numpy(listing.labels))
        for part, listing in parts.items()
    }
    fields = {"source", "resolution", "channels", "crop_ratio", "holdout_per_class"}
    fingerprint = digest(
        config.model_dump(mode="json", include=fields)
        | {"classes": classes, "images": {part: listing.digest() for part, listing in parts.items()}}
    )
    known = tuple(source.classes("train"))
    return Dataset(sets["train"], sets.get("holdout"), sets["test"], classes, known, fingerprint, tuple(faults))


def check_files(config: Data, workers: int) -> list[tuple[str, str]]:
    """Decode every image of the chosen classes, and return (file, reason) of those that cannot be.

    A JPEG with a damaged stretch that its decoder repairs counts as readable, as it does in a run.

    Args:
        config: which images.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        InputError: the data set or a class is missing.
    """
    source = _open(config)
    classes = _choose(source, config)
    if isinstance(source, Shards) and (damaged := source.damaged(classes)):
        return damaged
    names: list[str] = []
    faults: dict[str, str] = {}
    for split in SPLITS:
        listing, found = _list(source, split, classes)
        names += listing.names
        faults |= found
    faults |= _decode_all(source, [name for name in names if name not in faults], workers)
    return [(source.where(name), reason) for name, reason in faults.items()]


def _open(config: Data) -> Source:
    return Shards(Path(config.packed).expanduser(), config) if config.packed else open_source(config)


def normalise(images: torch.Tensor, config: Data) -> torch.Tensor:
    """Turn pixels 0 to 255 ([..., channels, H, W]) into the float32 that networks see: (x / 255 - mean) / std."""
    mean, std = _constants(config.mean, config.std, images.device)
    return (images.to(torch.float32) / 255 - mean) / std


def quantise(images: torch.Tensor, config: Data) -> torch.Tensor:
    """Turn normalised images ([..., channels, H, W]) into the nearest uint8 pixels: the inverse of ``normalise``."""
    mean, std = _constants(config.mean, config.std, images.device)
    return ((images.to(torch.float32) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def pixel_range(config: Data, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised values of black and of white, each [channels, 1, 1]."""
    black = torch.zeros((config.channels, 1, 1), dtype=torch.uint8, device=device)
    return normalise(black, config), normalise(black + 255, config)


@cache  # a copy to the device makes the host wait
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # whoever asks first
        first, second = torch.tensor([mean, std], device=device).reshape(2, -1, 1, 1)
    return first, second


def _fit(image: Image.Image, config: Data) -> torch.Tensor:
    """Resize the shorter side to ``resolution / crop_ratio`` and cut out the centre: uint8 [channels, H, W].

    Sizes are rounded as torchvision's Resize and CenterCrop round them.
    """
    image = image.convert("L" if config.channels == 1 else "RGB")
    side, short = round(config.resolution / config.crop_ratio), min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - config.resolution) / 2), round((height - config.resolution) / 2)
    image = image.crop((left, top, left + config.resolution, top + config.resolution))
    pixels = np.array(image).reshape(config.resolution, config.resolution, config.channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _choose(source: Source, config: Data) -> tuple[str, ...]:
    """Return the classes that ``config.classes`` asks for, after checking that both splits have the same."""
    names = source.classes("train")
    test = set(source.classes("test"))
    for missing, here, there in (
        (set(names) - test, "training", "validation"),
        (test - set(names), "validation", "training"),
    ):
        if missing:
            raise InputError(f"{config.source}: class {min(missing)!r} has {here} images but no {there} images")
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
        raise InputError("data.classes: names no class")
    for position, name in enumerate(wanted):
        if name not in names:
            # A list of a thousand names would hide the message.
            few = len(names) <= 20 or nearest(name, names).startswith("did")
            hint = nearest(name, names) if few else f"there are {len(names)}, {names[0]!r} to {names[-1]!r}"
            raise InputError(f"data.classes: no class {name!r}; {hint}")
        if name in wanted[:position]:
            raise InputError(f"data.classes: {name!r} is given twice")
    return tuple(wanted)


def _part(names: Sequence[str], start: int, end: int, given: str) -> slice:
    if end > len(names):
        raise InputError(f"{given}: there are only {len(names)} classes")
    if start >= end:
        raise InputError(f"{given}: selects no class")
    return slice(start, end)


def _list(source: Source, split: Split, classes: Sequence[str]) -> tuple[_Listing, dict[str, str]]:
    """List one split, have a first look at each image, and return it with the reason of each fault."""
    names: list[str] = []
    counts = []
    for label in classes:
        members = source.members(split, label)
        names += members
        counts.append(len(members))

    def look(chunk: Sequence[str]) -> list[Look]:
        return [source.look(name) for name in chunk]

    told = np.empty((2, len(names)), dtype=np.int64)
    faults = {}
    with ThreadPoolExecutor(_LOOKERS) as pool:
        looks = (look for chunk in pool.map(look, _chunks(names)) for look in chunk)
        for position, (identity, changed, fault) in enumerate(looks):
            told[:, position] = identity, changed
            if fault:
                faults[names[position]] = fault
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return _Listing(tuple(names), labels, told[0], told[1]), faults


def _chunks(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]


def _complaint(source: Source, faults: dict[str, str], total: int) -> str:
    examples = ", ".join(f"{source.where(name)} ({reason})" for name, reason in list(faults.items())[:3])
    more = ", ..." if len(faults) > 3 else ""
    return (
        f"{len(faults)} of {total} images cannot be read: {examples}{more}; "
        "data.on_error=skip leaves them out, `wmdd data check` lists them all"
    )


def _without(listing: _Listing, faults: dict[str, str], classes: Sequence[str], split: Split) -> _Listing:
    readable = np.array([name not in faults for name in listing.names])
    left = np.bincount(listing.labels[readable], minlength=len(classes))
    if not left.all():
        raise InputError(f"class {classes[int(left.argmin())]!r}: none of its {split} images can be read")
    return listing.take(readable)


def _held_out(listing: _Listing, classes: Sequence[str], count: int) -> np.ndarray:
    """Return which training images are kept apart (bool [N]): evenly spaced in each class, whatever the seed."""
    held = np.zeros(len(listing.names), dtype=bool)
    for index, name in enumerate(classes):
        start, end = np.searchsorted(listing.labels, [index, index + 1])
        if count >= end - start:
            raise InputError(
                f"data.holdout_per_class={count}: class {name!r} has {end - start} training images; one must remain"
            )
        held[start + (2 * np.arange(count) + 1) * (end - start) // max(2 * count, 1)] = True
    return held


def _decoding_faults(
    source: Source, listings: dict[Split, _Listing], known: dict[str, str], workers: int
) -> dict[str, str]:
    """Return why files that look whole cannot be decoded; from the cache, unless a file or the decoder is new."""
    from wmdd.store import cache_root

    if not isinstance(source, Tree):
        return {}
    key = digest([pillow_version, *([part.digest(), part.changed.tolist()] for part in listings.values())])
    path = cache_root() / "checks" / f"{key}.json"
    if not path.exists():
        names = [name for part in listings.values() for name in part.names if name not in known]
        write_json(path, _decode_all(source, names, workers))
    return read_json(path)


def _decode_all(source: Source, names: Sequence[str], workers: int) -> dict[str, str]:
    """Decode every image, and return the reason of those that cannot be."""
    faults: dict[str, str] = {}
    chunks = _chunks(names)
    with progress("decoding every image once", len(names), "images") as advance:
        for chunk, found in zip(chunks, _in_order(partial(_faults, source), chunks, workers), strict=True):
            faults |= found
            advance(len(chunk))
    return faults


def _faults(source: Source, names: Sequence[str]) -> dict[str, str]:
    faults = {}
    for name in names:
        try:
            source.read(name)
        except BrokenImage as error:
            faults[name] = error.reason
    return faults


class _Guarded(torch.utils.data.Dataset):
    """A function as DataLoader wants it; an error is returned, because raising it there would bury its message."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, batch: Any) -> Any:
        try:
            return self.function(batch)
        except WmddError as error:
            return error


def _outlast_signals(worker: int) -> None:
    """Go on after a signal to all processes of a run: it still wants its images while it checkpoints.

    SIGTERM is also how a process that ends in disorder ends its workers, so it is heeded after a while.
    """
    signals.leave_to_the_run()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_PATIENCE))


def _unchanged(value: Result) -> Result:
    return value


def _in_order(function: Callable[[Batch], Result], batches: Sequence[Batch], workers: int) -> Iterator[Result]:
    """Return ``function(batch)`` for each batch, worked out by one DataLoader of ``workers`` processes (0: here)."""
    if not workers or not batches:
        return map(function, batches)
    stream = _loaded(function, batches, workers)
    _streams.add(stream)
    return stream


_streams: "WeakSet[Iterator[Any]]" = WeakSet()


@atexit.register
def _close_streams() -> None:
    """End decoders in order when a program ends by an error: Python would send them SIGTERM and wait."""
    for stream in list(_streams):
        stream.close()  # type: ignore[attr-defined]


def _loaded(function: Callable[[Batch], Result], batches: Sequence[Batch], workers: int) -> Iterator[Result]:
    loader = torch.utils.data.DataLoader(
        _Guarded(function),
        batch_size=None,
        sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else it would draw its seed from the global one
        worker_init_fn=_outlast_signals,
    )
    try:
        for result in loader:
            if isinstance(result, WmddError):
                raise result
            yield result
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        if signals.requested():
            raise Interrupted("stopped while images were decoded") from None
        raise WmddError(
            f"a process that decodes images died ({error}); memory may be short: try fewer compute.workers, or 0"
        ) from error
