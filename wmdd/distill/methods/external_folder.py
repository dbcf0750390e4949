"""Other people's distilled sets: the class of each image in a folder, and its pixels at the run's resolution.

Every set is a folder with one sub-folder per class. The layout is the naming of the sub-folders:

``classes``
    The name of the class, as ``wmdd export`` writes it and torchvision's ImageFolder reads it
    (``n01440764/0003.png``).
``numbered``
    The position of the class in the sorted list of all classes of the dataset, not only of those in the run:
    ``new007/class007_id003.jpg`` of SRe2L and CDA (VILA-Lab/SRe2L, ``save_images`` in SRe2L/recover/data_synthesis.py
    and CDA/recover_cda_in1k.py), of EDC (shaoshitong/EDC, recover/recover.py) and of the paper's own code
    (Liu-Hy/WMDD, recover/data_synthesis_new.py); ``00007/class00007_id00003.jpg`` of RDED (LINs-lab/RDED,
    synthesize/main.py). The names of the files do not matter.

RDED numbers the classes of its own subsets (ImageNet-10, ImageNet-100) from zero. Such a set needs a dataset of those
classes alone. Soft labels that come with a set are not read; students get those of the run's teacher.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from wmdd.config.schema import DataConfig, ExternalConfig
from wmdd.data.dataset import Dataset, ImageSet, image_set
from wmdd.data.listing import listed_in_memory
from wmdd.data.sources import EXTENSIONS, Members, Split, Tree
from wmdd.errors import InputError
from wmdd.storage.files import digest, sha256

_NUMBERED = re.compile(r"(new)?[0-9]+")
_HASH_THREADS = 8
"""Threads that hash files; they mostly wait for the disk"""


class _ClassFolders(Tree):
    """Images in class folders, without folders for splits."""

    def __init__(self, root: Path, places: Mapping[str, str]) -> None:
        """Open a root folder; ``places`` holds the folder of each class, by class name."""
        super().__init__(root)
        self._places = places

    def classes(self, split: Split) -> list[str]:
        """Return the names of the classes."""
        return list(self._places)

    def members(self, split: Split, label: str) -> Members:
        """Return the images of a class, at any depth, possibly none."""
        return self.below(self._places[label])


def open_set(external: ExternalConfig, data: DataConfig, dataset: Dataset) -> ImageSet:
    """Return a distilled set, listed by class but not decoded.

    An image whose shorter side is the run's resolution stays unchanged. Any other image is resized like the dataset,
    but not cropped: ``data.crop_ratio`` is meant for photographs, and would cut the border off a distilled image.

    Args:
        external: folder and layout of the set.
        data: resolution and channels of the run.
        dataset: dataset of the run, with the names of its classes.

    Raises:
        InputError: no folder is named, the folder does not exist, or a class has no images.
    """
    root = _root(external)
    places = _places(root, external.layout, dataset.classes, dataset.all_classes)
    source = _ClassFolders(root, places)
    catalogue = listed_in_memory(source, dataset.classes, ("train",))
    for name, count in zip(dataset.classes, catalogue.counts("train"), strict=True):
        if not count:
            raise InputError(f"{root / places[name]}: contains no images of class {name!r} ({', '.join(EXTENSIONS)})")
    whole = data.replace({"crop_ratio": 1.0})
    return image_set(catalogue, whole, dataset.classes, np.arange(len(dataset.classes)), {"train": {}}, "train")


def check(images: ImageSet, external: ExternalConfig, ipc: int) -> None:
    """Check that a set is the one of the config, that it is readable, and that every class has ``ipc`` images.

    Raises:
        InputError: a class does not have ``ipc`` images, a file is not an image, or ``external.sha256`` does not match
            the files. The message names the class or the file.
    """
    folder = _root(external)
    for index, name in enumerate(images.classes):
        if (count := len(images.of_class(index))) != ipc:
            raise InputError(f"{folder}: class {name!r} has {count} images; every class needs ipc = {ipc} of them")
    for place, faults in images.catalogue.faults("train").items():
        for row, fault in faults.items():
            raise InputError(f"{images.catalogue.where('train', place, row)}: {fault.reason}")
    found = fingerprint(folder)
    if external.sha256 is None:
        raise InputError(
            f"external.sha256 is not set: without it a changed folder would go unnoticed; set it to {found}"
        )
    if external.sha256 != found:
        raise InputError(
            f"{folder}: has changed: external.sha256 is {external.sha256[:12]}, the files have {found[:12]};"
            " restore the files, or evaluate the new ones with another --out"
        )


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the images in the class folders: of their paths and contents.

    Raises:
        InputError: the folder does not exist, or its sub-folders contain no images.
    """
    names = [name for members in _listed(folder).values() for name in members]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return digest(list(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True)))


def images_per_class(folder: Path) -> int:
    """Return the most frequent number of images per class folder: the IPC of a complete set.

    Raises:
        InputError: the folder does not exist, or its sub-folders contain no images.
    """
    return Counter(len(members) for members in _listed(folder).values() if members).most_common(1)[0][0]


def _root(external: ExternalConfig) -> Path:
    if external.folder is None:
        raise InputError("external.folder is not set: name the folder of a distilled set, or use `wmdd bench evaluate`")
    return Path(external.folder).expanduser()


def _listed(folder: Path) -> dict[str, list[str]]:
    """Return the images of each sub-folder."""
    source = _ClassFolders(folder, {name: name for name in _folders(folder)})
    members = {name: source.members("train", name).names for name in source.classes("train")}
    listed = {folder: sorted(f"{folder}/{name}" for name in names) for folder, names in members.items()}
    if not any(listed.values()):
        raise InputError(
            f"{folder}: has no images in sub-folders; expected FOLDER/CLASS/IMAGE ({', '.join(EXTENSIONS)})"
        )
    return listed


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the folder that contains one sub-folder per class")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _places(root: Path, layout: str, classes: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Return the folder of each class of the run.

    Args:
        root: folder of the set.
        layout: value of ``external.layout``.
        classes: names of the classes of the run.
        known: names of all classes of the dataset.

    Raises:
        InputError: a class has no folder, or a number does not belong to the dataset.
    """
    folders = _folders(root)
    numbered = [name for name in folders if _NUMBERED.fullmatch(name)]
    if layout == "auto":
        layout = "classes" if set(classes) <= set(folders) or not numbered else "numbered"
    if layout == "classes":
        wanted, hint = {name: name for name in classes}, "Name each folder like its class"
        found = {name: name for name in folders}
    else:
        numbers = {name: str(number) for number, name in enumerate(sorted(known))}
        wanted = {name: numbers[name] for name in classes}
        found, hint = _numbers(root, numbered, len(numbers)), "Name each folder by its number, new000 or 00000"
    missing = [name for name in classes if wanted[name] not in found]
    if missing:
        first = missing[0] if layout == "classes" else f"{missing[0]}, number {wanted[missing[0]]} of {len(known)}"
        raise InputError(
            f"{root}: {len(missing)} of {len(classes)} classes have no folder, the first is {first}. Folders found:"
            f" {_few(folders)}. {hint}"
        )
    return {name: found[wanted[name]] for name in classes}


def _numbers(root: Path, folders: Sequence[str], classes: int) -> dict[str, str]:
    """Return the numbered folders, by number without leading zeros."""
    found: dict[str, str] = {}
    for name in folders:
        number = int(name.removeprefix("new"))
        if number >= classes:
            raise InputError(
                f"{root}: folder {name} is beyond the {classes} classes of the dataset, numbered from 0; does the set"
                " belong to another dataset?"
            )
        if (other := found.setdefault(str(number), name)) != name:
            raise InputError(f"{root}: folders {other} and {name} belong to the same class; remove one")
    return found


def _few(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:2])}, ..., {names[-1]}"
