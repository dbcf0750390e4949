"""Sources of images: trees of files and arrays in memory, with one interface to list, check and read images.

Image names are relative, with forward slashes (``train/n01443537/images/n01443537_0.JPEG``, ``train/17``).  Results
therefore do not depend on the folder of a dataset.
"""

import importlib.util
import os
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from wmdd.config.schema import DataConfig
from wmdd.errors import InputError, WmddError

Split = Literal["train", "test"]


SPLITS: tuple[Split, ...] = ("train", "test")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

ANNOTATIONS = "val/val_annotations.txt"


RELIST = "if it was changed on purpose, --refresh lists the dataset again"


_NESTED = {
    "imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160"),
    "tiny-imagenet": ("tiny-imagenet-200",),
}


_RECENT_NANOSECONDS = 2 * 10**9
"""Nanoseconds for which a new change time counts as unreliable: some file systems store whole seconds."""


_END_MARK_BYTES = 64
"""Bytes at the end of a file that must contain its end mark; some programs add padding after it."""


class BrokenImage(InputError):
    """An image that cannot be decoded, with its file and the reason."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}; data.on_error=skip leaves such images out"


class Look(NamedTuple):
    """Result of the check of one image without decoding."""

    identity: int
    """Size of the file in bytes, or the CRC-32 of an array."""
    changed: int
    """Time of the file's last change, in nanoseconds since 1970; 0 for an array."""
    fault: str | None
    """Reason why the file is not a usable image; None if it may be usable."""


class Members(NamedTuple):
    """The images of one class in one split, by name."""

    names: list[str]
    """Names relative to the first folder, in the order of rows"""
    folders: tuple[tuple[str, int], ...]
    """Every folder or index file read to find the names, relative to the root, with the time of its last change before
    that (nanoseconds since 1970; 0: unreliable)"""


class Source(ABC):
    """The images of one dataset, by split and class."""

    @abstractmethod
    def classes(self, split: Split) -> list[str]:
        """Return the names of the classes of a split, in order."""

    @abstractmethod
    def members(self, split: Split, label: str) -> Members:
        """Return the images of one class, in the order of their base names (arrays: positions).

        Raises:
            InputError: the class has no images.
        """

    @abstractmethod
    def look(self, name: str) -> Look:
        """Check an image without decoding it."""

    @abstractmethod
    def read(self, name: str, identity: int | None = None) -> Image.Image:
        """Return an image, fully decoded.

        Args:
            name: name of the image, relative to the root.
            identity: identity of the image in its listing; None: not checked.

        Raises:
            BrokenImage: the image cannot be decoded.
            InputError: the file size differs from the listing.
            WmddError: the system could not read the file.
        """

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the location of an image, for error messages."""


class Tree(Source):
    """Files below ``root/train/CLASS`` and ``root/val/CLASS`` (``root/test/CLASS`` where there is no ``val``)."""

    format = "folder"

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def folders(self) -> dict[Split, str]:
        """The folder of each split.

        Raises:
            InputError: a folder is missing.
        """
        test = next((name for name in ("val", "test") if (self.root / name).is_dir()), "val")
        folders: dict[Split, str] = {"train": "train", "test": test}
        for folder in folders.values():
            if not (self.root / folder).is_dir():
                raise InputError(
                    f"{self.root}: has no folder {folder!r}; expected train/CLASS/ and val/CLASS/ (or test/CLASS/)"
                )
        return folders

    def classes(self, split: Split) -> list[str]:
        """Return the names of the class folders, sorted."""
        return [entry.name for entry in _entries(self.root / self.folders[split]) if entry.is_dir()]

    def members(self, split: Split, label: str) -> Members:
        """Return the images below a class folder, at any depth."""
        found = self.below(f"{self.folders[split]}/{label}")
        if not found.names:
            folder = self.root / found.folders[0][0]
            raise InputError(f"{folder}: no images in this class folder ({', '.join(EXTENSIONS)})")
        return found

    def below(self, folder: str) -> Members:
        """Return the images below a folder, at any depth; perhaps none."""
        names: list[str] = []
        folders: list[tuple[str, int]] = []
        self._walk(folder, "", names, folders)
        return Members(sorted(names, key=_order), tuple(folders))

    def _walk(self, top: str, inner: str, names: list[str], folders: list[tuple[str, int]]) -> None:
        folder = f"{top}/{inner}".rstrip("/")
        folders.append((folder, changed(self.root / folder)))
        for entry in _entries(self.root / folder):
            if entry.is_dir():
                self._walk(top, f"{inner}{entry.name}/", names, folders)
            elif entry.name.lower().endswith(EXTENSIONS):
                names.append(f"{inner}{entry.name}")

    def look(self, name: str) -> Look:
        """Check the first and last bytes.  Decode the file only if its end mark is missing."""
        try:
            with open(self.where(name), "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                head = file.read(16)
                file.seek(-min(stat.st_size, _END_MARK_BYTES), os.SEEK_END)
                tail = file.read()
        except OSError as error:
            return Look(0, 0, f"cannot be read: {error.strerror}")
        fault = None
        if not head:
            fault = "is empty"
        elif (whole := _is_whole(head, tail, stat.st_size)) is None:
            fault = "is not a JPEG, PNG, BMP or WebP image"
        elif not whole:
            try:
                self.read(name)
            except BrokenImage as error:
                fault = error.reason
        return Look(stat.st_size, stat.st_mtime_ns, fault)

    def read(self, name: str, identity: int | None = None) -> Image.Image:
        """Decode a file.  Its extension, color profile and EXIF orientation are ignored."""
        path = self.where(name)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if identity is not None and size != identity:
                    raise InputError(f"{path}: has {size:,} bytes, but {identity:,} in the listing; {RELIST}")
                with Image.open(file) as image:
                    image.load()
        except MemoryError:
            raise
        except InputError:
            raise
        except UnidentifiedImageError:
            raise BrokenImage(path, "is not an image that can be decoded") from None
        except Exception as error:
            # Decoders raise errors of many types; only errors of the operating system have an errno.
            if isinstance(error, OSError) and error.errno is not None:
                gone = f"; {RELIST}" if isinstance(error, FileNotFoundError) else ""
                raise WmddError(f"{path}: cannot be read: {error.strerror}{gone}") from error
            raise BrokenImage(path, str(error) or type(error).__name__) from error
        if image.mode == "F" or image.mode.startswith("I"):
            # Pillow would clip such pixels to 255, and return a white image.
            raise BrokenImage(path, f"has more than 8 bits per channel (mode {image.mode})")
        return image

    def where(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self.root, name)


class TinyImageNet(Tree):
    """Tiny-ImageNet as published: ``val/val_annotations.txt`` contains the classes of ``val/images``."""

    format = "tiny-imagenet"

    @cached_property
    def _test(self) -> tuple[dict[str, list[str]], tuple[tuple[str, int], ...]]:
        """The names in ``val/images`` by class, and the folders and files that were read."""
        path = self.root / ANNOTATIONS
        read_from = tuple((name, changed(self.root / name)) for name in ("val/images", ANNOTATIONS))
        found: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            fields = line.split("\t")
            if len(fields) < 2:
                raise InputError(f"{path}:{number}: expected a file and a class, separated by a tab; found {line!r}")
            found.setdefault(fields[1], []).append(fields[0])
        return found, read_from

    def classes(self, split: Split) -> list[str]:
        """Return the WordNet ids, sorted."""
        return super().classes(split) if split == "train" else sorted(self._test[0])

    def members(self, split: Split, label: str) -> Members:
        """Return the images of a class: from its folder in ``train``, from the annotations in ``val``."""
        if split == "train":
            return super().members(split, label)
        names, read_from = self._test
        return Members(sorted(names[label], key=_order), read_from)


class Arrays(Source):
    """Images in memory.  An image's name is its split and its position there."""

    def __init__(self, title: str, classes: list[str], splits: Mapping[Split, tuple[np.ndarray, np.ndarray]]) -> None:
        """Store images (uint8, [N, H, W] or [N, H, W, 3]) and class indices ([N]) of each split."""
        self.title = title
        self._classes = classes
        self._places = {name: place for place, name in enumerate(classes)}
        self._splits = splits

    def classes(self, split: Split) -> list[str]:
        """Return the names of the classes; every split has all classes."""
        return self._classes

    def members(self, split: Split, label: str) -> Members:
        """Return the positions in the array as names, in order."""
        positions = np.flatnonzero(self._splits[split][1] == self._places[label])
        return Members([str(position) for position in positions], ((split, 0),))

    def look(self, name: str) -> Look:
        """Return the checksum of the pixels; an array has no faults."""
        return Look(zlib.crc32(self._pixels(name).tobytes()), 0, None)

    def read(self, name: str, identity: int | None = None) -> Image.Image:
        """Return one image of the array."""
        return Image.fromarray(self._pixels(name))

    def where(self, name: str) -> str:
        """Return the names of the dataset and the image."""
        return f"{self.title} {name}"

    def _pixels(self, name: str) -> np.ndarray:
        split, position = name.split("/")
        return self._splits["train" if split == "train" else "test"][0][int(position)]


def in_memory(config: DataConfig) -> bool:
    """Return whether the dataset is held in memory; then every process lists it itself."""
    return config.source in ARRAYS and config.format == "auto"


def open_source(config: DataConfig) -> Source:
    """Find the dataset of a config.

    Raises:
        InputError: the dataset is absent or has another layout; the message names the remedy.
    """
    root = folder_of(config.source, config.root)
    remedy = "set its folder with data.root=..."
    if config.source not in ("folder", *BUILT_IN):
        remedy = f"run `wmdd data fetch {config.source}`, or {remedy}"
    if in_memory(config) and config.source in BUILT_IN:
        return ARRAYS[config.source](root, remedy)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; {remedy}")
    if in_memory(config):
        return ARRAYS[config.source](root, remedy)
    root = unnested(config.source, root)
    if not (root / "train").is_dir():
        raise InputError(f"{root}: has no folder 'train'; {remedy}")
    if config.format == "folder" or (config.format == "auto" and config.source != "tiny-imagenet"):
        return Tree(root)
    if (root / ANNOTATIONS).is_file():
        # Some scripts move the images of val into class folders, but keep the annotations.
        rearranged = any(entry.is_dir() and entry.name != "images" for entry in _entries(root / "val"))
        return Tree(root) if rearranged and config.format == "auto" else TinyImageNet(root)
    if config.format == "tiny-imagenet":
        raise InputError(f"data.format='tiny-imagenet': {root} has no {ANNOTATIONS}; use data.format=auto")
    return Tree(root)


def tree_of(format: str, root: Path) -> Tree:
    """Return the tree that another process has found, without reading the disk."""
    return {kind.format: kind for kind in (Tree, TinyImageNet)}[format](root)


def base_name(name: str) -> str:
    """Return an image's name without folders and extension; it is the same in every archive."""
    return os.path.splitext(os.path.basename(name))[0]


def _order(name: str) -> tuple[str, str]:
    return base_name(name), name


def changed(path: Path | str) -> int:
    """Return the time of a folder's last change in nanoseconds since 1970, or 0 if it is unreliable.

    It is unreliable if the folder is absent, or if the change is so recent that a further one could have the same time.
    """
    try:
        found = os.stat(path).st_mtime_ns
    except OSError:
        return 0
    return 0 if abs(time.time_ns() - found) < _RECENT_NANOSECONDS else found


def folder_of(name: str, root: str | Path | None) -> Path:
    """Return the folder of a dataset: ``root``, or ``data/NAME`` if it is None."""
    return Path("data") / name if root is None else Path(root).expanduser()


def unnested(name: str, root: Path) -> Path:
    """Return the folder that contains ``train``: the root, or the folder inside the unpacked archive."""
    places = [root, *(root / inner for inner in _NESTED.get(name, ()))]
    return next((place for place in places if (place / "train").is_dir()), root)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder by name, without hidden entries (archive programs of some systems add them)."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if re.search("[\ud800-\udfff]", entry.name):
            raise InputError(f"{folder}: the name {entry.name!a} is not UTF-8; rename it")
    return entries


def _is_whole(head: bytes, tail: bytes, size: int) -> bool | None:
    """Return whether a file has the end mark of its format, from its first and last bytes; None: unknown format.

    The content decides, not the extension: ImageNet contains a PNG file with the extension .JPEG.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" in tail
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" in tail
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return size >= 8 + int.from_bytes(head[4:8], "little")
    if head.startswith(b"BM"):
        return size >= int.from_bytes(head[2:6], "little")
    return None


def _digits(root: Path, remedy: str) -> Source:
    # load_digits reads this file, but the import of scikit-learn is slow.
    package = importlib.util.find_spec("sklearn")
    (folder,) = (package and package.submodule_search_locations) or ["sklearn"]
    table = np.loadtxt(Path(folder) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    scans, labels = table[:, :-1], table[:, -1].astype(int)
    images = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    held = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held[np.flatnonzero(labels == label)[4::5]] = True
    splits: dict[Split, tuple[np.ndarray, np.ndarray]] = {
        "train": (images[~held], labels[~held]),
        "test": (images[held], labels[held]),
    }
    return Arrays("digits", [str(label) for label in range(10)], splits)


def _cifar10(root: Path, remedy: str) -> Source:
    from torchvision.datasets import CIFAR10

    try:
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except RuntimeError:
        raise InputError(f"{root}: the files of CIFAR-10 are missing or damaged; {remedy}") from None
    splits: dict[Split, tuple[np.ndarray, np.ndarray]] = {
        "train": (train.data, np.asarray(train.targets)),
        "test": (test.data, np.asarray(test.targets)),
    }
    return Arrays("cifar10", list(train.classes), splits)


ARRAYS: dict[str, Callable[[Path, str], Source]] = {"digits": _digits, "cifar10": _cifar10}
"""Sources whose images fit in memory, each by a function of its folder and of what to do where files are missing"""
BUILT_IN = ("digits",)
"""Those of them that come with a library and need no folder"""
