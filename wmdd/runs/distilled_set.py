"""The distilled set: load, verify, export."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from wmdd.config.schema import Config, DataConfig
from wmdd.data.pixels import normalize
from wmdd.errors import InputError, WmddError
from wmdd.runs.folder import RunFolder
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.storage.files import read_tensors, write_bytes


@dataclass(frozen=True)
class DistilledSet(TorchDataset[tuple[Tensor, int]]):
    """Images of a finished run, as they were quantised; indexing gives (normalised image, label).

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
    """How the images were made: resolution, channels, normalisation"""
    sha256: str
    """Names these images, labels and weights, however they were spread over blocks"""
    bytes: int = 0
    """Size of its files on disk; 0 for a set that was never written"""
    seeded: bool = True
    """Whether another distillation seed gives other images; False for a selection that no seed changes"""

    @staticmethod
    def load(run: str | Path) -> "DistilledSet":
        """Load the set of a run folder, checking every block's SHA-256.

        Raises:
            InputError: the folder holds no run.
            WmddError: blocks are missing or damaged; the message names them.
        """
        folder = RunFolder(Path(run))
        config = Config.model_validate(folder.bound()["config"])
        manifest = folder.manifest()
        if manifest["missing"]:
            missing = ", ".join(map(str, manifest["missing"]))
            raise WmddError(f"{folder.path}: of {config.blocks} blocks these are missing: {missing}; run it again")
        if problems := verify(folder):
            raise WmddError(f"{'; '.join(problems)}; run it again")
        files = [folder.block_file(block) for block in range(config.blocks)]
        parts = [read_tensors(file) for file in files]
        merged = {name: torch.cat([part[name] for part in parts]) for name in ("images", "labels", "weights")}
        sidecars = [folder.sidecar(block) or {} for block in range(config.blocks)]
        return DistilledSet(
            **merged,
            classes=tuple(manifest["classes"]),
            data=config.data,
            sha256=manifest["sha256"],
            bytes=sum(file.stat().st_size for file in files),
            seeded=all(sidecar.get("seeded", True) for sidecar in sidecars),
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalize(self.images[index : index + 1], self.data)[0], int(self.labels[index])


def verify(folder: RunFolder) -> list[str]:
    """Hash every block that has a sidecar and compare their arithmetics; return what is wrong, one line each."""
    blocks = range(folder.bound()["config"]["blocks"])
    problems = [reason for block in blocks if (reason := folder.damaged(block))]
    used: dict[str, list[int]] = {}
    for block in blocks:
        if sidecar := folder.sidecar(block):
            found = Arithmetic.from_facts(sidecar.get("arithmetic"))
            used.setdefault(str(found or "an unknown arithmetic"), []).append(block)
    if len(used) > 1:
        parts = "; ".join(f"{', '.join(map(str, own))} in {name}" for name, own in used.items())
        problems.append(f"{folder.path}: its blocks were computed differently ({parts}); delete those of one kind")
    return problems


def export(
    distilled: DistilledSet, format: str, out: Path, advance: Callable[[int], None] = lambda images: None
) -> None:
    """Write the set for other tools, losslessly.

    Args:
        distilled: what to write.
        format: ``imagefolder`` (OUT/CLASS/0000.png) or ``parquet`` (OUT/distilled.parquet: PNG bytes, label, class
            name, weight; the layout that the Hugging Face image feature reads).
        out: a new or empty folder.
        advance: called with the number of images done.

    Raises:
        InputError: unknown format, or ``out`` is not empty.
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


def _png(image: Tensor) -> bytes:
    from torchvision.transforms.v2.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "png")
    return buffer.getvalue()
