"""The listing of a dataset: names, sizes and faults of its images, in one memory-mapped file.

An image has a split, a class and a row.  The row is its position among the images of its class, ordered by base name.
A listing contains the names and sizes of all rows, the digest of each class, and the faults of unusable images.
Readers load only the classes that they need; the rows of other classes stay on the disk.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from wmdd.data.sources import SPLITS, Look, Members, Source, Split, base_name
from wmdd.errors import WmddError
from wmdd.storage.files import write_tensors

VERSION = 1
ABSENT, LISTED, DECODED = 0, 1, 2
"""State of a class in a listing: not listed, each file checked, or each file also decoded."""


class Fault(NamedTuple):
    """The reason why an image is unusable, and the state of its file at that time."""

    reason: str
    decoded: bool = False
    """Whether decoding found the fault"""
    size: int = 0
    """Size of the file in bytes; 0 if there is no file"""
    changed: int = 0
    """Time of the file's last change, in nanoseconds since 1970; 0 if there is no file"""


def _starts(lengths: Any) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, dtype=np.int64))])


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings in one array of bytes."""

    text: np.ndarray
    """UTF-8 text: uint8 [bytes]"""
    starts: np.ndarray
    """First byte of each string, and the end of the last: int64 [strings + 1]"""

    def __getitem__(self, row: int) -> str:
        return bytes(self.text[self.starts[row] : self.starts[row + 1]]).decode()

    def between(self, start: int, stop: int) -> "Strings":
        """Return the strings from ``start`` to ``stop`` (excluded)."""
        starts = self.starts[start : stop + 1]
        return Strings(self.text[starts[0] : starts[-1]], starts - starts[0])

    @staticmethod
    def from_list(strings: Iterable[str]) -> "Strings":
        """Return a list of strings in this form."""
        encoded = [string.encode() for string in strings]
        text = np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)
        return Strings(text, _starts([len(one) for one in encoded]))

    @staticmethod
    def joined(parts: Sequence["Strings"]) -> "Strings":
        """Return the strings of all parts, one part after the other."""
        lengths = [np.diff(part.starts) for part in parts]
        return Strings(_joined([part.text for part in parts], np.uint8), _starts(_joined(lengths, np.int64)))


@dataclass(frozen=True, eq=False)
class Rows:
    """The images of one class in one split."""

    names: Strings
    """Names, relative to ``folders[0]``"""
    identities: np.ndarray
    """Size of each file in bytes, or the CRC-32 of an array: int64 [rows]"""
    folders: tuple[tuple[str, int], ...]
    """Every folder (and index file) read to find the names, relative to the root, with the time of its last change
    (nanoseconds since 1970; 0: unreliable).  ``names`` are relative to the first folder"""
    faults: Mapping[int, Fault] = field(default_factory=dict)
    state: int = LISTED
    """ABSENT, LISTED or DECODED"""

    def __len__(self) -> int:
        return len(self.identities)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over base name and identity of every row, usable or not."""
        return self.digest_of(range(len(self)))

    def digest_of(self, rows: Iterable[int]) -> bytes:
        """Return the SHA-256 over base name (without extension) and identity of these rows.

        It does not cover folders and file formats: an archive of the same images has the same digest.
        """
        found = hashlib.sha256()
        for row in rows:
            found.update(f"{base_name(self.names[row])}\0{self.identities[row]}\n".encode())
        return found.digest()


@dataclass(frozen=True, eq=False)
class Part:
    """The classes of one split, one after the other; ``C`` classes, ``N`` images, ``F`` folders."""

    starts: np.ndarray
    """First row of each class, and the end of the last: int64 [C + 1]"""
    names: Strings
    """[N]"""
    identities: np.ndarray
    """int64 [N]"""
    digests: np.ndarray
    """uint8 [C, 32]"""
    states: np.ndarray
    """uint8 [C]"""
    folder_starts: np.ndarray
    """First folder of each class, and the end of the last: int64 [C + 1]"""
    folders: Strings
    """[F]"""
    changed: np.ndarray
    """int64 [F]"""
    faults: Mapping[int, Mapping[int, Fault]]
    """Faults by class and row; most classes have none"""

    @staticmethod
    def from_classes(classes: Sequence[Rows]) -> "Part":
        """Return a part with these classes."""
        folders = [folder for rows in classes for folder in rows.folders]
        return Part(
            _starts([len(rows) for rows in classes]),
            Strings.joined([rows.names for rows in classes]),
            _joined([rows.identities for rows in classes], np.int64),
            np.frombuffer(bytearray(b"".join(rows.digest for rows in classes)), dtype=np.uint8).reshape(-1, 32),
            np.array([rows.state for rows in classes], dtype=np.uint8),
            _starts([len(rows.folders) for rows in classes]),
            Strings.from_list(name for name, _ in folders),
            np.array([changed for _, changed in folders], dtype=np.int64),
            {index: dict(rows.faults) for index, rows in enumerate(classes) if rows.faults},
        )

    def rows(self, index: int) -> Rows:
        """Return the rows of one class, as slices of the arrays."""
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        names, identities = self.names.between(start, stop), self.identities[start:stop]
        found = Rows(names, identities, self.folders_of(index), self.faults.get(index, {}), int(self.states[index]))
        vars(found)["digest"] = self.digests[index].tobytes()  # already known, so not computed again
        return found

    def folders_of(self, index: int) -> tuple[tuple[str, int], ...]:
        """Return the folders of a class, with the times of their last changes."""
        places = range(int(self.folder_starts[index]), int(self.folder_starts[index + 1]))
        return tuple((self.folders[place], int(self.changed[place])) for place in places)

    def name(self, index: int, row: int) -> str:
        """Return the name of an image, relative to the root."""
        return f"{self.folders[self.folder_starts[index]]}/{self.names[self.starts[index] + row]}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the arrays for the file, by name."""
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("starts", "identities", "digests", "states", "folder_starts", "changed")
        strings = {"names": self.names, "folders": self.folders}
        return (
            {name: getattr(self, name) for name in names}
            | {f"{name}.text": each.text for name, each in strings.items()}
            | {f"{name}.starts": each.starts for name, each in strings.items()}
        )

    @staticmethod
    def read(get: Callable[[str], np.ndarray], faults: Mapping[str, Mapping[str, list[Any]]]) -> "Part":
        """Return the part that ``tensors`` and a listing's metadata describe."""
        names, folders = (Strings(get(f"{name}.text"), get(f"{name}.starts")) for name in ("names", "folders"))
        known = {int(index): {int(row): Fault(*fault) for row, fault in rows.items()} for index, rows in faults.items()}
        first = (get("starts"), names, get("identities"), get("digests"), get("states"))
        return Part(*first, get("folder_starts"), folders, get("changed"), known)


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a dataset, by split."""

    classes: tuple[str, ...]
    """Names of all classes of the dataset; only requested classes are listed"""
    parts: Mapping[Split, Part]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts, such as the version of the decoder"""
    path: Path | None = None
    """File that the listing is mapped from, if any"""

    def __reduce__(self) -> Any:
        if self.path is not None:  # another process maps the file instead of receiving a copy
            return open_listing, (self.path,)
        return Listing, (self.classes, self.parts, self.facts)

    @cached_property
    def places(self) -> dict[str, int]:
        """Position of each class."""
        return {name: index for index, name in enumerate(self.classes)}

    def rows(self, label: str) -> dict[Split, Rows]:
        """Return the rows of one class in each split; an unknown class has no rows."""
        if label not in self.places:
            return {split: Rows(Strings.from_list([]), np.zeros(0, np.int64), (), state=ABSENT) for split in self.parts}
        return {split: part.rows(self.places[label]) for split, part in self.parts.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors for the file."""
        found = {split: part.tensors() for split, part in self.parts.items()}
        return {f"{split}.{name}": value for split, tensors in found.items() for name, value in tensors.items()}

    def metadata(self) -> dict[str, str]:
        """Return the metadata for the file."""
        faults = {split: part.faults for split, part in self.parts.items()}
        content = {"version": VERSION, "classes": self.classes, "facts": self.facts, "faults": faults}
        return {"listing": json.dumps(content, ensure_ascii=False)}

    def write(self, path: Path) -> None:
        """Write the listing atomically."""
        write_tensors(path, self.tensors(), self.metadata())

    @staticmethod
    def read(file: Any, path: Path | None = None) -> "Listing":
        """Return the listing in an open safetensors file.

        Raises:
            KeyError, ValueError, TypeError: the file contains no listing, or one of another version.
        """
        content = json.loads((file.metadata() or {})["listing"])
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, expected {VERSION}")

        def getter(split: str) -> Callable[[str], np.ndarray]:
            return lambda name: file.get_tensor(f"{split}.{name}").numpy()

        parts = {split: Part.read(getter(split), faults) for split, faults in content["faults"].items()}
        return Listing(tuple(content["classes"]), parts, content["facts"], path)


def open_listing(path: Path) -> Listing:
    """Memory-map a listing.

    Raises:
        WmddError: the file is absent or damaged; the message names the file.
    """
    import safetensors

    try:
        return Listing.read(safetensors.safe_open(path, "pt"), path)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise WmddError(f"{path}: is not a listing of a dataset ({error}); --refresh creates a new one") from None


class Catalogue(ABC):
    """The listed images of a dataset by split, class and row.

    A class is identified by its position in ``classes``.
    """

    classes: tuple[str, ...]
    """Names of all classes of the dataset"""

    @abstractmethod
    def counts(self, split: Split) -> np.ndarray:
        """Return the number of rows of each class: int64 [C]."""

    @abstractmethod
    def digests(self, split: Split) -> np.ndarray:
        """Return the digest of each class: uint8 [C, 32]."""

    @abstractmethod
    def faults(self, split: Split) -> Mapping[int, Mapping[int, Fault]]:
        """Return the faults by class and row."""

    @abstractmethod
    def rows(self, split: Split, index: int) -> Rows:
        """Return the rows of one class."""

    @abstractmethod
    def name(self, split: Split, index: int, row: int) -> str:
        """Return the name of an image, such as ``train/cat/001.png`` or ``train/17``."""

    @abstractmethod
    def read(self, split: Split, index: int, row: int) -> Image.Image:
        """Return an image, fully decoded.

        Raises:
            BrokenImage: the image cannot be decoded.
            InputError: the image differs from its listing.
            WmddError: the system could not read the file.
        """

    @abstractmethod
    def where(self, split: Split, index: int, row: int) -> str:
        """Return the location of an image, for error messages."""


class ListedCatalogue(Catalogue):
    """The images of a source and its listing."""

    def __init__(self, source: Source, listing: Listing) -> None:
        self.source = source
        self.listing = listing
        self.classes = listing.classes

    def counts(self, split: Split) -> np.ndarray:
        """Return the number of rows of each class; 0 for a class that is not listed."""
        return np.diff(self.listing.parts[split].starts)

    def digests(self, split: Split) -> np.ndarray:
        """Return the digest of each class."""
        return self.listing.parts[split].digests

    def faults(self, split: Split) -> Mapping[int, Mapping[int, Fault]]:
        """Return the faults by class and row."""
        return self.listing.parts[split].faults

    def rows(self, split: Split, index: int) -> Rows:
        """Return the rows of one class."""
        return self.listing.parts[split].rows(index)

    def name(self, split: Split, index: int, row: int) -> str:
        """Return the name of an image, relative to the root."""
        return self.listing.parts[split].name(index, row)

    def read(self, split: Split, index: int, row: int) -> Image.Image:
        """Read an image, and check it against the size in the listing."""
        part = self.listing.parts[split]
        return self.source.read(part.name(index, row), int(part.identities[part.starts[index] + row]))

    def where(self, split: Split, index: int, row: int) -> str:
        """Return the path of an image file, or the name of an image in an array."""
        return self.source.where(self.name(split, index, row))


def listed_in_memory(source: Source, classes: Sequence[str], splits: Sequence[Split] = SPLITS) -> ListedCatalogue:
    """List a small source or arrays in this process, without the cache."""
    parts = {
        split: Part.from_classes([_looked_at(source, source.members(split, label)) for label in classes])
        for split in splits
    }
    return ListedCatalogue(source, Listing(tuple(classes), parts))


def _looked_at(source: Source, members: Members) -> Rows:
    return rows_of(members, [source.look(f"{members.folders[0][0]}/{name}") for name in members.names])


def rows_of(members: Members, looks: Sequence[Look]) -> Rows:
    """Return the rows of a class, from the check of each image."""
    faults = {
        row: Fault(look.fault, False, look.identity, look.changed) for row, look in enumerate(looks) if look.fault
    }
    identities = np.array([look.identity for look in looks], dtype=np.int64)
    return Rows(Strings.from_list(members.names), identities, members.folders, faults)


def _joined(arrays: Sequence[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, kind)
