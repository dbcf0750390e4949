"""Download datasets, or unpack archives that the user has put into a folder (``wmdd data fetch``)."""

import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wmdd.data.sources import BUILT_IN, folder_of, unnested
from wmdd.errors import InputError, WmddError, nearest

TINY_ARCHIVE = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
"""URL and MD5 of the official archive of Tiny-ImageNet."""


def fetch(name: str, root: Path | None = None) -> Path:
    """Download a dataset, or unpack the archives in its folder; return that folder.

    Existing files stay unchanged.  Imagenette is fetched in its 320-pixel version.

    Args:
        name: name of the dataset, as in ``data.source``.
        root: folder of the dataset; None: ``data/NAME``.

    Raises:
        InputError: the dataset does not exist, or the user must download it by hand.
        WmddError: the download failed.
    """
    if name == "folder":
        raise InputError("folder: these are your own images; set their folder with data.root=...")
    makers: dict[str, Callable[[Path], None]] = {
        "cifar10": _fetch_cifar10,
        "imagenette": _fetch_imagenette,
        "tiny-imagenet": _fetch_tiny,
        "imagenet-1k": _fetch_imagenet,
    }
    place = folder_of(name, root)
    if name in BUILT_IN:
        return place
    if name not in makers:
        raise InputError(f"{name}: no such dataset; {nearest(name, [*BUILT_IN, *makers])}")
    try:
        place.mkdir(parents=True, exist_ok=True)
        makers[name](place)
    except (OSError, RuntimeError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise WmddError(f"{name}: cannot be fetched into {place}: {error}") from error
    return place


def _make_whole(target: Path, make: Callable[[Path], object]) -> None:
    """Let ``make`` fill a temporary folder next to ``target``, then move ``target.name`` out of it, atomically."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        make(Path(temporary))
        os.replace(Path(temporary) / target.name, target)


def _fetch_cifar10(root: Path) -> None:
    from torchvision.datasets import CIFAR10

    CIFAR10(root, download=True)


def _fetch_imagenette(root: Path) -> None:
    from torchvision.datasets import Imagenette

    if not (unnested("imagenette", root) / "train").is_dir():
        _make_whole(root / "imagenette2-320", lambda folder: Imagenette(folder, size="320px", download=True))


def _fetch_tiny(root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    url, md5 = TINY_ARCHIVE
    if not (unnested("tiny-imagenet", root) / "train").is_dir():
        _make_whole(
            root / "tiny-imagenet-200",
            lambda folder: download_and_extract_archive(url, str(root), extract_root=str(folder), md5=md5),
        )


def _fetch_imagenet(root: Path) -> None:
    """Unpack the archives like torchvision.datasets.ImageNet, but an interruption leaves no partial folder."""
    from torchvision.datasets import imagenet

    wanted = [split for split in ("train", "val") if not (root / split).is_dir()]
    if not wanted:
        return
    archives = [imagenet.ARCHIVE_META[key][0] for key in ("devkit", *wanted)]
    missing = [archive for archive in archives if not (root / archive).is_file()]
    if missing:
        raise InputError(
            f"imagenet-1k: its license requires that you download it yourself from https://image-net.org/download; "
            f"put {', '.join(missing)} into {root} and run this command again"
        )
    imagenet.parse_devkit_archive(root)
    parsers = {"train": imagenet.parse_train_archive, "val": imagenet.parse_val_archive}
    for split in wanted:
        _make_whole(root / split, partial(_unpack, parsers[split], root, split))


def _unpack(parse: Callable[..., None], root: Path, split: str, temporary: Path) -> None:
    parse(root, folder=f"{temporary.name}/{split}")  # torchvision joins the folder to the root
