"""Other people's distilled sets: whose class each image of a folder is, and its pixels at the run's resolution.

Every set is a folder with one sub-folder a class.  What the sub-folders are called is its layout:

``classes``
    The names of the classes, as ``wmdd export`` writes them and torchvision's ImageFolder reads them
    (``n01440764/0003.png``).
``numbered``
    The position of the class in the sorted list of all classes of the data set, whichever of them a run chooses:
    ``new007/class007_id003.jpg`` of SRe2L and CDA (VILA-Lab/SRe2L, ``save_images`` in SRe2L/recover/data_synthesis.py
    and CDA/recover_cda_in1k.py), of EDC (shaoshitong/EDC, recover/recover.py) and of the paper's own code
    (Liu-Hy/WMDD, recover/data_synthesis_new.py); ``00007/class00007_id00003.jpg`` of RDED (LINs-lab/RDED,
    synthesize/main.py).  What the files are called plays no part.

RDED numbers the classes of its own subsets (ImageNet-10, ImageNet-100) from zero: such a set belongs to a data set of
those classes alone.  Soft labels that come with a set are not read; students get those of the run's teacher.
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
"""Threads that hash and look at files, which mostly wait for the disk"""


class _ClassFolders(Tree):
    """Images below class folders that lie side by side, without splits."""

    def __init__(self, root: Path, places: Mapping[str, str]) -> None:
        """Take the folder of each class, by the class's name."""
        super().__init__(root)
        self._places = places

    def classes(self, split: Split) -> list[str]:
        """Return the names of the classes."""
        return list(self._places)

    def members(self, split: Split, label: str) -> Members:
        """Return the images of a class, at any depth; there may be none."""
        return self.below(self._places[label])


def open_set(external: ExternalConfig, data: DataConfig, dataset: Dataset) -> ImageSet:
    """Return a distilled set, listed by class but not decoded.

    An image whose shorter side is the run's resolution is taken as it is; any other is resized as the data are, but
    whole: ``data.crop_ratio`` belongs to photographs, and would cut the border off a distilled image.

    Args:
        external: folder and layout.
        data: resolution and channels.
        dataset: names of the chosen classes and of all of them.

    Raises:
        InputError: no folder is given, it does not exist, or it holds no images of some class.
    """
    root = _root(external)
    places = _places(root, external.layout, dataset.classes, dataset.all_classes)
    source = _ClassFolders(root, places)
    catalogue = listed_in_memory(source, dataset.classes, ("train",))
    for name, count in zip(dataset.classes, catalogue.counts("train"), strict=True):
        if not count:
            raise InputError(f"{root / places[name]}: no images of class {name!r} in it ({', '.join(EXTENSIONS)})")
    whole = data.replace({"crop_ratio": 1.0})
    return image_set(catalogue, whole, dataset.classes, np.arange(len(dataset.classes)), {"train": {}}, "train")


def check(images: ImageSet, external: ExternalConfig, ipc: int) -> None:
    """Refuse a set that is not the one of the config, that is uneven, or that cannot be read.

    Raises:
        InputError: a class has not ``ipc`` images, a file is no image, or the files are not those of
            ``external.sha256``; the message names the class or the file.
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
            f"external.sha256 is not set: without it a changed folder would pass unseen; set it to {found}"
        )
    if external.sha256 != found:
        raise InputError(
            f"{folder}: has changed: external.sha256 is {external.sha256[:12]}, the files are {found[:12]};"
            " bring the files back, or evaluate the new ones into another --out"
        )


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 that names the images in the class folders: their places and contents.

    Raises:
        InputError: the folder does not exist, or there are no images in its folders.
    """
    names = [name for members in _listed(folder).values() for name in members]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return digest(list(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True)))


def images_per_class(folder: Path) -> int:
    """Return how many images most of the class folders hold: the IPC, if the set is whole.

    Raises:
        InputError: the folder does not exist, or there are no images in its folders.
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
        raise InputError(f"{folder}: no images in its folders; expected FOLDER/CLASS/IMAGE ({', '.join(EXTENSIONS)})")
    return listed


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds a folder for each class")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _places(root: Path, layout: str, classes: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Return the folder of each of ``classes``, where ``known`` are all of the data set.

    Raises:
        InputError: a class has no folder, or a number is not one of the data set's.
    """
    folders = _folders(root)
    numbered = [name for name in folders if _NUMBERED.fullmatch(name)]
    if layout == "auto":
        layout = "classes" if set(classes) <= set(folders) or not numbered else "numbered"
    if layout == "classes":
        wanted, hint = {name: name for name in classes}, "they are to bear the names of the classes"
        found = {name: name for name in folders}
    else:
        order = sorted(known)
        wanted = {name: str(order.index(name)) for name in classes}
        found, hint = _numbers(root, numbered, len(order)), "they are to be called new000 or 00000, by position"
    missing = [name for name in classes if wanted[name] not in found]
    if missing:
        first = missing[0] if layout == "classes" else f"{missing[0]}, number {wanted[missing[0]]} of {len(known)}"
        raise InputError(
            f"{root}: no folder for class {first} ({len(missing)} of {len(classes)} classes have none); {hint}, and are"
            f" {_few(folders)}"
        )
    return {name: found[wanted[name]] for name in classes}


def _numbers(root: Path, folders: Sequence[str], classes: int) -> dict[str, str]:
    """Return numbered folders by their number, without leading zeros."""
    found: dict[str, str] = {}
    for name in folders:
        number = int(name.removeprefix("new"))
        if number >= classes:
            raise InputError(
                f"{root}: folder {name} is beyond the {classes} classes of the data set, numbered from 0; is this a set"
                " of another data set?"
            )
        if (other := found.setdefault(str(number), name)) != name:
            raise InputError(f"{root}: folders {other} and {name} stand for the same class; remove one")
    return found


def _few(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:2])}, ..., {names[-1]}"
