"""Packed images: decoded once, kept as uint8 in shards of whole classes, read by memory map and staged on a node.

A folder of shards holds ``index.json`` (the settings, all classes, the shards with their SHA-256) and one safetensors
file for each shard: the tensors ``train`` and ``test``, uint8 [N, channels, H, W], and for every image its name, what
the first look told of its file, and the CRC-32 of its pixels.  What is read from it is what was packed, byte for byte.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from PIL import Image

from wmdd.config import Data
from wmdd.console import progress
from wmdd.errors import InputError, WmddError
from wmdd.files import digest, locked, read_json, sha256
from wmdd.sources import SPLITS, Look, Source, Split

INDEX = "index.json"
VERSION = 1
SETTINGS = ("source", "resolution", "channels", "crop_ratio")
"""Fields of ``data`` that the pixels and names of shards depend on."""


@dataclass(frozen=True)
class Packed:
    """What is known of one packed image."""

    name: str
    identity: int
    """As its source told (``Look.identity``)"""
    crc: int
    """CRC-32 of its pixels; 0 where it has none"""
    fault: str | None = None
    """Why it was left out, if it was"""


def settings_of(config: Data) -> dict[str, Any]:
    """Return the settings that shards are made under."""
    return config.model_dump(mode="json", include=set(SETTINGS))


class Shards(Source):
    """The images of a packed folder, under the names that they had."""

    def __init__(self, root: Path, config: Data) -> None:
        """Read the index, and check that it fits the config.

        Raises:
            InputError: the folder has no index, or was packed under other settings.
        """
        remedy = f"pack it again: wmdd data pack CONFIG --out {root}"
        if not (root / INDEX).is_file():
            raise InputError(f"data.packed={root}: has no finished {INDEX}; {remedy}")
        try:
            index = read_json(root / INDEX)
            version, made = index["version"], index["data"]
            self._all: list[str] = index["classes"]
            self._shards: list[dict[str, Any]] = index["shards"]
            self._shard_of = {name: number for number, one in enumerate(self._shards) for name in one["classes"]}
        except (WmddError, KeyError, TypeError) as error:
            raise InputError(f"{root / INDEX}: is damaged ({error}); {remedy}") from None
        if version != VERSION:
            raise InputError(f"data.packed={root}: is of version {version}, this wmdd reads {VERSION}; {remedy}")
        for field, wanted in settings_of(config).items():
            if made.get(field) != wanted:
                raise InputError(
                    f"data.packed={root}: was packed with data.{field}={made.get(field)!r}, the config asks for "
                    f"{wanted!r}; set data.{field}={made.get(field)!r}, or {remedy}"
                )
        self.root = root
        self.stage = None if config.stage is None else _stage_folder(Path(config.stage).expanduser(), index)
        self._looks: dict[str, Packed] = {}
        self._places: dict[str, tuple[int, Split, int]] = {}
        self._members: dict[tuple[str, Split], list[str]] = {}
        self._maps: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}  # a mapping is of one process

    def classes(self, split: Split) -> list[str]:
        """Return the classes of the data set that was packed, also those that were not."""
        return self._all

    def members(self, split: Split, label: str) -> list[str]:
        """Return the names of the images of one class, those that were left out included.

        Raises:
            InputError: the class was not packed, or its shard is missing or damaged.
        """
        number = self._shard_of.get(label)
        if number is None:
            raise InputError(
                f"data.packed={self.root}: holds {len(self._shard_of)} of {len(self._all)} classes, and {label!r} is "
                "none of them; choose others by data.classes, or pack more"
            )
        if (label, split) not in self._members:
            self._read(number)
        return self._members[label, split]

    def look(self, name: str) -> Look:
        """Return what was told when the image was packed."""
        found = self._looks[name]
        return Look(found.identity, 0, found.fault)

    def read(self, name: str) -> Image.Image:
        """Return the image as it was packed: resized and cropped."""
        pixels = self.images([name])[0]
        return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())

    def where(self, name: str) -> str:
        """Return the shard and the image."""
        place = self._places.get(name)
        return f"{self.root / self._shards[place[0]]['file'] if place else self.root} ({name})"

    def images(self, names: Sequence[str]) -> torch.Tensor:
        """Return images: uint8 [n, channels, resolution, resolution].

        Raises:
            InputError: a shard is missing, or the pixels are not those that were packed.
        """
        rows = []
        for name in names:
            number, split, position = self._places[name]
            if number not in self._maps:
                self._maps[number] = _open(self.path(number))
            pixels = self._maps[number].get_slice(split)[position]
            if zlib.crc32(pixels.numpy().data) != self._looks[name].crc:
                raise InputError(f"{self.where(name)}: is damaged; delete {self.path(number)} and make it again")
            rows.append(pixels)
        return torch.stack(rows)

    def path(self, number: int) -> Path:
        """Return the place of a shard: where it was packed, or its copy on this node, which is made if need be."""
        entry = self._shards[number]
        origin: Path = self.root / entry["file"]
        if self.stage is None:
            return origin
        copy = self.stage / entry["file"]
        if not copy.is_file():
            with locked(self.stage / f"{entry['file']}.lock"):
                if not copy.is_file():
                    _copy(origin, copy, entry["bytes"], entry["sha256"])
        return copy

    def damaged(self, classes: Iterable[str]) -> list[tuple[str, str]]:
        """Hash the shards of these classes; return (shard, reason) of those that are not what was packed."""
        found = []
        numbers = sorted({self._shard_of[name] for name in classes})
        with progress("hashing the packed images", len(numbers), "shards") as advance:
            for entry in (self._shards[number] for number in numbers):
                if sha256(self.root / entry["file"]) != entry["sha256"]:
                    found.append((str(self.root / entry["file"]), "is damaged: its SHA-256 is not that of the index"))
                advance(1)
        return found

    def _read(self, number: int) -> None:
        """Note what a shard holds: once, for it tells of all its classes."""
        entry = self._shards[number]
        path = self.root / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            state = "is cut short or has grown" if path.is_file() else "is missing"
            raise InputError(f"{path}: {state}; run `wmdd data pack` again, which makes only what is not whole")
        contents = contents_of(path)
        for split in SPLITS:
            kept = [image for images in contents.values() for image in images[split]]
            self._members |= {(name, split): [image.name for image in contents[name][split]] for name in contents}
            self._looks |= {image.name: image for image in kept}
            whole = [image.name for image in kept if image.fault is None]
            self._places |= {name: (number, split, position) for position, name in enumerate(whole)}


def contents_of(path: Path) -> dict[str, dict[str, list[Packed]]]:
    """Return what a shard holds, by class and split, in the order of its rows.

    Raises:
        InputError: it is damaged.
    """
    try:
        told = json.loads(_open(path).metadata()["classes"])
        return {
            name: {split: [Packed(*row) for row in rows] for split, rows in splits.items()}
            for name, splits in told.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is no shard of packed images ({error}); pack it again") from None


def _open(path: Path) -> Any:
    """Map a shard into memory; nothing is read until it is asked for."""
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: is not a whole shard ({error}); pack or stage it again") from None


def _stage_folder(stage: Path, index: dict[str, Any]) -> Path:
    folder = stage / f"wmdd-{digest(index)[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.stage={stage}: cannot be written: {error.strerror}") from None
    return folder


def _copy(origin: Path, copy: Path, size: int, sha: str) -> None:
    """Copy a shard whole or not at all."""
    free = shutil.disk_usage(copy.parent).free
    if free < size:
        raise InputError(f"data.stage={copy.parent}: {size / 1e9:.2f} GB asked, {free / 1e9:.2f} GB free; leave it out")
    temporary = copy.with_name(f".{copy.name}.tmp")  # one name: the lock is held, so what lies there is left over
    try:
        shutil.copyfile(origin, temporary)
        if sha256(temporary) != sha:
            raise InputError(f"{origin}: is damaged: its SHA-256 is not that of the index; pack it again")
        os.replace(temporary, copy)
    except OSError as error:
        raise WmddError(f"{copy}: cannot be staged: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
