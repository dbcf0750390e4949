"""Packed images: uint8 pixels in shards of whole classes, memory-mapped, and optionally copied to a local disk.

A packed folder contains ``index.json`` and one safetensors file for each shard.  The index contains the settings, all
classes, the SHA-256 of each shard, and for each class its count, digest and faults.  A shard contains the pixels
``train.pixels`` and ``test.pixels`` (uint8 [N, channels, H, W]), their CRC-32 (int64 [N]) and the listing of its
classes.  A process opens the index and the shards of its own classes.  It reads exactly the packed bytes.
"""

import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image

from wmdd.config.schema import DataConfig
from wmdd.data.listing import Catalogue, Fault, Listing, Rows
from wmdd.data.sources import SPLITS, Split
from wmdd.errors import InputError, WmddError
from wmdd.runtime.progress_bars import progress
from wmdd.storage.files import digest, locked, read_json, sha256

INDEX = "index.json"
VERSION = 2
SETTINGS = ("source", "resolution", "channels", "crop_ratio")
"""Keys of ``data`` that decide the pixels and names of shards."""


@dataclass(frozen=True)
class Shard:
    """Index entry of one shard."""

    file: str
    bytes: int
    sha256: str
    classes: tuple[str, ...]
    counts: Mapping[Split, tuple[int, ...]]
    """Number of rows of each class, including rows without pixels"""
    digests: Mapping[Split, tuple[str, ...]]
    """Digest of each class, in hexadecimal"""
    left_out: Mapping[Split, Mapping[str, Mapping[str, str]]]
    """Reason for each image without pixels, by class and row"""


@dataclass(frozen=True)
class _Mapped:
    """A memory-mapped shard."""

    listing: Listing
    pixels: Mapping[Split, torch.Tensor]
    crcs: Mapping[Split, torch.Tensor]


def settings_of(config: DataConfig) -> dict[str, Any]:
    """Return the settings that decide the shards."""
    return config.model_dump(mode="json", include=set(SETTINGS))


class Shards(Catalogue):
    """The images of a packed folder, under their original names."""

    def __init__(self, root: Path, config: DataConfig) -> None:
        """Read the index, and check that it fits the config.

        Raises:
            InputError: the folder has no index, or was packed with other settings.
        """
        remedy = f"pack it again: wmdd data pack CONFIG --out {root}"
        if not (root / INDEX).is_file():
            raise InputError(f"data.packed={root}: has no finished {INDEX}; {remedy}")
        try:
            index = read_json(root / INDEX)
            version, made = index["version"], index["data"]
            if version == VERSION:
                self.classes = tuple(index["classes"])
                self.shards = [Shard(**entry) for entry in index["shards"]]
        except (WmddError, KeyError, TypeError) as error:
            raise InputError(f"{root / INDEX}: is damaged ({error}); {remedy}") from None
        if version != VERSION:
            raise InputError(f"data.packed={root}: has format version {version}, this wmdd reads {VERSION}; {remedy}")
        for field, wanted in settings_of(config).items():
            if made.get(field) != wanted:
                raise InputError(
                    f"data.packed={root}: was packed with data.{field}={made.get(field)!r}, the config has "
                    f"{wanted!r}; set data.{field}={made.get(field)!r}, or {remedy}"
                )
        self.root = root
        self.stage = None if config.stage is None else _stage_folder(Path(config.stage).expanduser(), index)
        known = {name: place for place, name in enumerate(self.classes)}
        self._places = {
            known[name]: (number, position)
            for number, shard in enumerate(self.shards)
            for position, name in enumerate(shard.classes)
        }
        self._counts = {split: np.zeros(len(self.classes), np.int64) for split in SPLITS}
        self._digests = {split: np.zeros((len(self.classes), 32), np.uint8) for split in SPLITS}
        self._faults: dict[Split, dict[int, dict[int, Fault]]] = {split: {} for split in SPLITS}
        self._shape = (config.channels, config.resolution, config.resolution)
        self._numbers = np.zeros(len(self.classes), np.int64)
        """Shard of each class"""
        self._firsts = {split: np.zeros(len(self.classes), np.int64) for split in SPLITS}
        """Position of each class's first image in the pixels of its shard"""
        for number, shard in enumerate(self.shards):
            places = [known[name] for name in shard.classes]
            self._numbers[places] = number
            for split in SPLITS:
                self._counts[split][places] = shard.counts[split]
                stored = [
                    count - len(shard.left_out[split].get(name, {}))
                    for name, count in zip(shard.classes, shard.counts[split], strict=True)
                ]
                self._firsts[split][places] = np.cumsum([0, *stored])[:-1]
                self._digests[split][places] = [list(bytes.fromhex(each)) for each in shard.digests[split]]
                for name, rows in shard.left_out[split].items():
                    self._faults[split][known[name]] = {int(row): Fault(reason) for row, reason in rows.items()}
        self._maps: dict[int, _Mapped] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}  # each process maps the shards itself

    def counts(self, split: Split) -> np.ndarray:
        """Return the number of rows of each class; 0 for a class that was not packed."""
        return self._counts[split]

    def digests(self, split: Split) -> np.ndarray:
        """Return the digest of each class."""
        return self._digests[split]

    def faults(self, split: Split) -> Mapping[int, Mapping[int, Fault]]:
        """Return the reasons why images were left out, by class and row."""
        return self._faults[split]

    def rows(self, split: Split, index: int) -> Rows:
        """Return the rows of one class, from its shard."""
        number, position = self._places[index]
        return self._mapped(number).listing.parts[split].rows(position)

    def name(self, split: Split, index: int, row: int) -> str:
        """Return the name of an image in the original dataset."""
        number, position = self._places[index]
        return self._mapped(number).listing.parts[split].name(position, row)

    def read(self, split: Split, index: int, row: int) -> Image.Image:
        """Return the packed image: resized and cropped."""
        pixels = self.pixels(split, np.array([index]), np.array([row]))[0]
        return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())

    def where(self, split: Split, index: int, row: int) -> str:
        """Return the path of the shard and the name of the image."""
        number, _ = self._places[index]
        return f"{self.root / self.shards[number].file} ({self.name(split, index, row)})"

    def pixels(self, split: Split, indices: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Return images by class and row (int64 [n] each): uint8 [n, channels, resolution, resolution].

        Raises:
            InputError: the shard is missing, or its pixels are damaged.
        """
        images = torch.empty((len(rows), *self._shape), dtype=torch.uint8)
        numbers, places = self._numbers[indices], self._firsts[split][indices] + rows
        for index in set(self._faults[split]).intersection(indices.tolist()):
            own = np.flatnonzero(indices == index)
            places[own] -= np.searchsorted(sorted(self._faults[split][index]), rows[own])
        for number in np.unique(numbers).tolist():
            mapped, own = self._mapped(number), np.flatnonzero(numbers == number)
            chosen = torch.from_numpy(places[own])
            found, crcs = mapped.pixels[split][chosen], mapped.crcs[split][chosen].tolist()
            for position, (image, crc) in enumerate(zip(found.numpy(), crcs, strict=True)):
                if zlib.crc32(image.data) != crc:
                    where = self.where(split, int(indices[own[position]]), int(rows[own[position]]))
                    raise InputError(f"{where}: is damaged; delete {self.path(number)} and pack or stage it again")
            images[torch.from_numpy(own)] = found
        return images

    def path(self, number: int) -> Path:
        """Return the path of a shard: the original, or the copy on this node's disk, which is created if missing."""
        shard = self.shards[number]
        origin = self.root / shard.file
        if self.stage is None:
            return origin
        copy = self.stage / shard.file
        if not copy.is_file():
            with locked(self.stage / f"{shard.file}.lock"):
                if not copy.is_file():
                    _copy(origin, copy, shard.bytes, shard.sha256)
        return copy

    def check(self, classes: Iterable[str]) -> None:
        """Refuse classes that were not packed, and shards of another size than in the index.

        Raises:
            InputError: a class or shard is missing or wrong; the message names it.
        """
        packed = {name: number for number, shard in enumerate(self.shards) for name in shard.classes}
        for name in classes:
            if name not in packed:
                raise InputError(
                    f"data.packed={self.root}: contains {len(packed)} of {len(self.classes)} classes, but not {name!r};"
                    " select other classes with data.classes, or pack more"
                )
        for number in sorted({packed[name] for name in classes}):
            path = self.root / self.shards[number].file
            if not path.is_file() or path.stat().st_size != self.shards[number].bytes:
                state = "has the wrong size" if path.is_file() else "is missing"
                raise InputError(
                    f"{path}: {state}; run `wmdd data pack` again, which packs only missing or damaged shards"
                )

    def damaged(self, classes: Iterable[str]) -> list[tuple[str, str]]:
        """Hash the shards of these classes; return (shard, reason) for each damaged shard."""
        chosen, found = set(classes), []
        shards = [shard for shard in self.shards if chosen & set(shard.classes)]
        with progress("hashing the packed images", len(shards), "shards") as advance:
            for shard in shards:
                if sha256(self.root / shard.file) != shard.sha256:
                    found.append((str(self.root / shard.file), "is damaged: its SHA-256 differs from the index"))
                advance(1)
        return found

    def _mapped(self, number: int) -> _Mapped:
        """Memory-map a shard, once.  Its pixels are read only on access."""
        if number not in self._maps:
            path = self.path(number)
            try:
                file = safetensors.safe_open(path, "pt")
                self._maps[number] = _Mapped(
                    Listing.read(file),
                    {split: file.get_tensor(f"{split}.pixels") for split in SPLITS},
                    {split: file.get_tensor(f"{split}.crcs") for split in SPLITS},
                )
            except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
                raise InputError(f"{path}: is not a complete shard ({error}); pack or stage it again") from None
        return self._maps[number]


def _stage_folder(stage: Path, index: dict[str, Any]) -> Path:
    folder = stage / f"wmdd-{digest(index)[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.stage={stage}: cannot be written: {error.strerror}") from None
    return folder


def _copy(origin: Path, copy: Path, size: int, sha: str) -> None:
    """Copy a shard atomically."""
    free = shutil.disk_usage(copy.parent).free
    if free < size:
        raise InputError(
            f"data.stage={copy.parent}: a shard needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; unset it"
        )
    temporary = copy.with_name(f".{copy.name}.tmp")  # the lock is held, so an existing file is left over
    try:
        shutil.copyfile(origin, temporary)
        if sha256(temporary) != sha:
            raise InputError(f"{origin}: is damaged: its SHA-256 differs from the index; pack it again")
        os.replace(temporary, copy)
    except OSError as error:
        raise WmddError(f"{copy}: cannot be staged: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
