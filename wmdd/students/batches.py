"""Augmented batches of distilled images, which depend on the seed alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmdd.config.schema import Config, LabelsConfig
from wmdd.data import augment
from wmdd.data.image_parts import ImageParts, take
from wmdd.data.pixels import normalize
from wmdd.runtime.seeding import generator

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """Images and random choices of one update."""

    images: Tensor
    """[b] int64, positions in the set"""
    draws: augment.Draws
    """Crop and flip of each image"""
    partners: Tensor
    """[b] int64, position in the batch of each image's partner in the mix"""
    box: Tensor
    """[4] int64, the CutMix box: top, bottom, left, right; empty for other mixes"""
    share: float
    """λ, the share of the image itself in the mix"""


def batch_rows(count: int, batch_size: int) -> list[slice]:
    """Return the rows of each batch of an epoch, in the order in which the epoch visits ``count`` images.

    A single remaining image joins the previous batch, because BatchNorm needs two.
    """
    cuts = list(range(batch_size, count - 1, batch_size))
    return [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]


def batches(
    seed: int,
    epoch: int,
    count: int,
    size: int,
    batch_size: int,
    settings: LabelsConfig,
    device: torch.device = _CPU,
) -> list[Batch]:
    """Draw the batches of one epoch. They are drawn on the CPU, so that they are the same on every device.

    Args:
        seed: random seed of the student.
        epoch: number of the epoch, from 0.
        count: number of images in the distilled set.
        size: height and width of the images, in pixels.
        batch_size: images per update (``batch_rows``).
        settings: crops, flips and mixing.
        device: device of the batches. All are copied at once: every copy makes the host wait.
    """
    source = generator("student", seed, "epoch", epoch)
    order = torch.randperm(count, generator=source)
    draws = augment.draw((count,), size, (settings.crop_scale, 1.0), settings.flip, 0, source)
    rows = batch_rows(count, batch_size)
    concentration = torch.full((len(rows),), settings.mix_alpha)
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
    partners = torch.cat([torch.randperm(piece.stop - piece.start, generator=source) for piece in rows]).to(device)
    order, draws, boxes = order.to(device), draws.to(device), boxes.to(device)
    return [
        Batch(order[piece], draws[piece], partners[piece], box, share)
        for piece, box, share in zip(rows, boxes, shares.tolist(), strict=True)
    ]


def augmented_batch(images: Tensor | ImageParts, batch: Batch, config: Config) -> Tensor:
    """Return the cropped, flipped and mixed images of a batch: [b, channels, H, W] float32.

    Args:
        images: images of the whole set, [N, channels, H, W] uint8.
        batch: batch to compute. Its device may be another one.
        config: config with normalization and kind of mixing.
    """
    seen = augment.warp(normalize(take(images, batch.images), config.data), batch.draws)
    others = seen[batch.partners]
    if config.labels.mix == "cutmix":
        return torch.where(augment.inside(batch.box, seen.shape[-1]), others, seen)
    return seen if batch.share == 1 else batch.share * seen + (1 - batch.share) * others
