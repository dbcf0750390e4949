"""What students learn from: augmented, mixed batches of distilled images and the teacher's labels for them (FKD).

Every batch of every epoch follows from the student's seed, so its soft labels can be computed online at no cost in
bytes, or stored and replayed (Shen & Xing 2022, "A Fast Knowledge Distillation Framework for Visual Recognition").
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wmdd import augment
from wmdd.config import Config, Labels
from wmdd.data import normalise
from wmdd.distilled import DistilledSet
from wmdd.distributed import Ranks, generator
from wmdd.errors import WmddError
from wmdd.files import digest, read_tensors, write_tensors
from wmdd.teacher import Teacher


@dataclass(frozen=True)
class Batch:
    """How one update sees the distilled set."""

    images: Tensor
    """[b] int64, positions in the set"""
    draws: augment.Draws
    """crop and flip of each image"""
    partners: Tensor
    """[b] int64, position in the batch that each image is mixed with"""
    box: Tensor
    """[4] int64, the CutMix box: top, bottom, left, right; empty for other mixes"""
    share: float
    """λ, the share that an image keeps of itself"""


def batches(seed: int, epoch: int, count: int, size: int, batch_size: int, settings: Labels) -> list[Batch]:
    """Draw the batches of one epoch.

    Args:
        seed: of the student.
        epoch: from 0.
        count: images in the distilled set.
        size: height and width, in pixels.
        batch_size: images of one update; a rest of one image joins the batch before it (BatchNorm needs two).
        settings: crops, flips and mixing.
    """
    source = generator("student", seed, "epoch", epoch)
    order = torch.randperm(count, generator=source)
    draws = augment.draw((count,), size, (settings.crop_scale, 1.0), settings.flip, 0, source)
    cuts = list(range(batch_size, count - 1, batch_size))
    concentration = torch.full((len(cuts) + 1,), settings.mix_alpha)
    # Beta(α, α) as a ratio of Gammas, because torch.distributions takes no generator.
    gammas = [torch._standard_gamma(concentration, generator=source) for _ in range(2)]
    shares = gammas[0] / (gammas[0] + gammas[1])
    boxes = augment.mix_boxes(size, shares, source)
    if settings.mix == "cutmix":
        shares = 1 - ((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])) / size**2
    else:
        boxes = torch.zeros_like(boxes)
    if settings.mix == "none":
        shares = torch.ones_like(shares)
    pieces = torch.arange(count).tensor_split(cuts)
    return [
        Batch(order[piece], draws[slice(int(piece[0]), int(piece[-1]) + 1)], partners, box, float(share))
        for piece, box, share in zip(pieces, boxes, shares, strict=True)
        for partners in [torch.randperm(len(piece), generator=source)]
    ]


def view(images: Tensor, batch: Batch, config: Config) -> Tensor:
    """Return the batch as a student sees it: [b, channels, H, W] float32, cropped, flipped, mixed.

    Args:
        images: the whole set, [N, channels, H, W] uint8, on the device.
        batch: what to do.
        config: normalisation and kind of mixing.
    """
    device = images.device
    chosen = normalise(images[batch.images.to(device)], config.data)
    seen = augment.warp(chosen, batch.draws.to(device))
    others = seen[batch.partners.to(device)]
    if config.labels.mix == "cutmix":
        return torch.where(augment.inside(batch.box.to(device), seen.shape[-1]), others, seen)
    return seen if batch.share == 1 else batch.share * seen + (1 - batch.share) * others


class SoftLabels:
    """The teacher's logits for every batch of a student's training, online or stored.

    Args:
        config: of the run.
        distilled: the set.
        teacher: who labels.
        seed: of the student.
        ranks: device and precision.
        folder: where labels are stored when ``labels.stored`` asks for it.
    """

    def __init__(
        self, config: Config, distilled: DistilledSet, teacher: Teacher, seed: int, ranks: Ranks, folder: Path
    ) -> None:
        self._config, self._teacher, self._seed, self._ranks = config, teacher, seed, ranks
        self._count = len(distilled)
        student = config.student
        self.identity = digest(
            [distilled.sha256, teacher.sha256, config.fingerprint("labels"), seed, student.batch_size]
        )
        """Names what these labels were made from"""
        self.folder = folder / self.identity[:16]

    def online(self, views: Tensor) -> Tensor:
        """Return the teacher's logits [b, C] float32 for a batch as the student sees it."""
        with torch.inference_mode(), self._ranks.autocast():
            return self._teacher.network(views).logits.float().clone()

    def file(self, epoch: int) -> Path:
        """Return the file of one epoch's logits."""
        return self.folder / f"epoch-{epoch:05d}.safetensors"

    def store(self, images: Tensor, epoch: int) -> None:
        """Write one epoch's logits as fp16 [N, C], in the order in which the epoch visits the images."""
        plan = self._plan(epoch)
        logits = torch.cat([self.online(view(images, batch, self._config)) for batch in plan])
        write_tensors(self.file(epoch), {"logits": logits.half()}, {"labels": self.identity})

    def read(self, epoch: int) -> list[Tensor]:
        """Return one epoch's stored logits, float32, batch by batch.

        Raises:
            WmddError: the file is absent or damaged, or does not fit the set.
        """
        logits: Tensor = read_tensors(self.file(epoch))["logits"]
        if len(logits) != self._count:
            raise WmddError(f"{self.file(epoch)}: holds labels of {len(logits)} images, the set has {self._count}")
        sizes = [len(batch.images) for batch in self._plan(epoch)]
        return [part.float().to(self._ranks.device) for part in logits.split(sizes)]

    def _plan(self, epoch: int) -> list[Batch]:
        data, student = self._config.data, self._config.student
        return batches(self._seed, epoch, self._count, data.resolution, student.batch_size, self._config.labels)
