"""The distilled set: load, verify, export."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from wmdd.config.schema import Config, DataConfig
from wmdd.data.image_parts import ImageParts
from wmdd.data.pixels import normalize
from wmdd.errors import InputError, WmddError
from wmdd.runs.folder import RunFolder
from wmdd.storage.files import map_and_hash, write_bytes, write_json


@dataclass(frozen=True)
class DistilledSet(TorchDataset[tuple[Tensor, int]]):
    """Quantized images of a finished run. Indexing returns (normalized image, label).

    Example:
        >>> distilled = DistilledSet.load("runs/digits")
        >>> len(distilled), distilled.images.shape, distilled.images.dtype
        (100, torch.Size([100, 1, 16, 16]), torch.uint8)
        >>> image, label = distilled[0]
    """

    images: Tensor
    """[N, channels, H, W] uint8"""
    labels: Tensor
    """[N] int64, positions in ``classes``"""
    weights: Tensor
    """[N] float32, barycenter weight of each image within its class"""
    classes: tuple[str, ...]
    """Names of all classes of the run"""
    data: DataConfig
    """Resolution, channels and normalization of the images"""
    sha256: str
    """Digest of images, labels and weights; does not depend on the blocks"""
    bytes: int = 0
    """Size of the files on disk; 0 for a set that was never written"""
    seeded: bool = True
    """Whether another distillation seed gives other images; False for a selection without random choices"""

    @staticmethod
    def load(run: str | Path) -> "DistilledSet":
        """Load the set of a run folder, and check every block's SHA-256.

        Raises:
            InputError: the folder contains no run.
            WmddError: blocks are missing or damaged. The message names them.
        """
        folder = RunFolder(Path(run))
        return map_set(folder, complete_manifest(folder)).joined()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalize(self.images[index : index + 1], self.data)[0], int(self.labels[index])


def counted_weights(weights: Tensor, power: float) -> Tensor:
    """Return w^γ of the images of each class, normalized: how much each image counts (``barycenter.weight_power``).

    Args:
        weights: barycenter weights [..., K]; each row sums to one.
        power: γ, at least 0. 1 returns the weights themselves, 0 returns 1/K.
    """
    if power == 1:
        return weights
    if power == 0:
        return torch.full_like(weights, 1 / weights.shape[-1])
    powered = weights.pow(power)
    return powered / powered.sum(-1, keepdim=True)


def complete_manifest(folder: RunFolder) -> dict[str, Any]:
    """Return the manifest of a run folder whose blocks all have a sidecar.

    Raises:
        InputError: the folder contains no run.
        WmddError: blocks are missing. The message names them.
    """
    manifest = folder.manifest()
    if manifest["missing"]:
        missing, blocks = ", ".join(map(str, manifest["missing"])), folder.bound()["config"]["blocks"]
        raise WmddError(
            f"{folder.path}: of {blocks} blocks, these are missing: {missing}; start the run again: it distills them"
        )
    return manifest


@dataclass(frozen=True)
class MappedSet:
    """A distilled set whose images stay in the files of its blocks. All processes of a machine share these pages.

    The attributes are those of ``DistilledSet``.
    """

    images: ImageParts
    labels: Tensor
    weights: Tensor
    classes: tuple[str, ...]
    data: DataConfig
    sha256: str
    bytes: int
    seeded: bool

    def __len__(self) -> int:
        return len(self.images)

    def joined(self) -> DistilledSet:
        """Return the set with all images in one tensor. The images of a set of one block are not copied."""
        return DistilledSet(**{**vars(self), "images": self.images.joined()})


def map_set(folder: RunFolder, manifest: Mapping[str, Any]) -> MappedSet:
    """Memory-map the blocks of a complete run folder, and check their SHA-256. Each file is opened once.

    Args:
        folder: run folder.
        manifest: its manifest (``complete_manifest``).

    Raises:
        WmddError: blocks are damaged, or were computed differently. The message names them.
    """
    data = Config.model_validate(folder.bound()["config"]).data
    problems, parts, size = [], [], 0
    for index, wanted in manifest["blocks"].items():
        file = folder.block_file(int(index))
        try:
            tensors, sha = map_and_hash(file)
        except WmddError as error:
            problems.append(str(error))
            continue
        if sha != wanted:
            problems.append(f"{file}: its SHA-256 differs from the one in its sidecar")
        parts.append(tensors)
        size += file.stat().st_size
    if len(used := manifest["arithmetics"]) > 1:
        names = "; ".join(f"{', '.join(map(str, own))} in {name}" for name, own in used.items())
        problems.append(f"{folder.path}: its blocks were computed differently ({names}); delete those of one kind")
    if problems:
        raise WmddError(f"{'; '.join(problems)}; start the run again: it distills damaged blocks once more")
    return MappedSet(
        ImageParts([part["images"] for part in parts]),
        torch.cat([part["labels"] for part in parts]),
        torch.cat([part["weights"] for part in parts]),
        tuple(manifest["classes"]),
        data,
        manifest["sha256"],
        size,
        manifest["seeded"],
    )


def export(
    distilled: DistilledSet, format: str, out: Path, advance: Callable[[int], None] = lambda images: None
) -> None:
    """Write the set for other tools, losslessly, and describe it in ``OUT/distilled.json``.

    The description has the class names in the order of the labels, mean and standard deviation of the channels (scale 0
    to 1), the resolution, and the SHA-256 of the set.

    Args:
        distilled: set to write.
        format: ``imagefolder`` (OUT/CLASS/0000.png) or ``parquet`` (OUT/distilled.parquet). The Parquet file has PNG
            bytes, label, class name and weight, in the layout of the Hugging Face image feature.
        out: new or empty folder.
        advance: called with the number of images done.

    Raises:
        InputError: the format is unknown, or ``out`` is not empty.
    """
    if format not in ("imagefolder", "parquet"):
        raise InputError(f"--format {format}: expected imagefolder or parquet")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; name a new folder")
    rows = []
    counts: dict[int, int] = {}
    for image, label, weight in zip(
        distilled.images, distilled.labels.tolist(), distilled.weights.tolist(), strict=True
    ):
        png = _png(image)
        name = distilled.classes[label]
        position = counts[label] = counts.get(label, -1) + 1
        if format == "imagefolder":
            write_bytes(out / name / f"{position:04d}.png", png)
        else:
            picture = {"bytes": png, "path": f"{name}/{position:04d}.png"}
            rows.append({"image": picture, "label": label, "class": name, "weight": weight})
        advance(1)
    if format == "parquet":
        import pandas

        buffer = io.BytesIO()
        pandas.DataFrame(rows).to_parquet(buffer)
        write_bytes(out / "distilled.parquet", buffer.getvalue())
    keys = {"resolution", "channels", "mean", "std"}
    description = {"classes": distilled.classes, "sha256": distilled.sha256, **distilled.data.model_dump(include=keys)}
    write_json(out / "distilled.json", description)


def _png(image: Tensor) -> bytes:
    from torchvision.transforms.v2.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "png")
    return buffer.getvalue()
