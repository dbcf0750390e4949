"""Crop, resize, flip and roll as one linear map per axis; CutMix.  Batched, seeded, replayable.

A random resized crop, a mirror and a cyclic shift act on rows and columns separately.  Their composition is therefore
``R x Cᵀ`` with two H x H matrices.  A matrix product is deterministic on every device, forward and backward; the
backward pass of a gather is not deterministic on CUDA.  Its shapes are static, and it needs no host synchronization.
Random draws are tables from CPU generators, so that any iteration can be replayed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Augmentation of B images (B = 1: the same for all images), in whole pixels of the source image."""

    boxes: Tensor
    """[..., B, 4] int64: top, left, height, width of the crop"""
    flips: Tensor
    """[..., B] bool: mirror left to right"""
    shifts: Tensor
    """[..., B, 2] int64: cyclic shift down and right, after resizing and mirroring"""

    def __getitem__(self, index: int | slice | Tensor) -> "Draws":
        return Draws(self.boxes[index], self.flips[index], self.shifts[index])

    def to(self, device: torch.device) -> "Draws":
        """Return the tables on a device."""
        return Draws(self.boxes.to(device), self.flips.to(device), self.shifts.to(device))


def draw(
    shape: tuple[int, ...],
    size: int,
    scale: tuple[float | Tensor, float],
    flip: bool,
    jitter: int,
    generator: torch.Generator,
) -> Draws:
    """Draw crops as torchvision's RandomResizedCrop does (ratio 3/4 to 4/3, ten tries, else the whole image).

    Args:
        shape: shape of the table, such as (iterations, B).
        size: height and width of the images, in pixels.
        scale: smallest and largest share of the area; the smallest may be a tensor that broadcasts to ``shape``.
        flip: whether to mirror with probability one half.
        jitter: largest cyclic shift along each axis, in pixels.
        generator: CPU generator.
    """
    tries = (10, *shape)
    low, high = scale
    area = size * size * (low + (high - low) * torch.rand(tries, generator=generator))
    ratio = torch.exp(torch.empty(tries).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator))
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (widths >= 1) & (widths <= size) & (heights >= 1) & (heights <= size)
    first = fits.int().argmax(0, keepdim=True)
    some = fits.any(0)
    width = torch.where(some, widths.gather(0, first)[0], size)
    height = torch.where(some, heights.gather(0, first)[0], size)
    top, left = ((torch.rand(shape, generator=generator) * (size - side + 1)).long() for side in (height, width))
    flips = torch.rand(shape, generator=generator) < (0.5 if flip else 0.0)
    shifts = torch.randint(-jitter, jitter + 1, (*shape, 2), generator=generator)
    return Draws(torch.stack([top, left, height, width], -1), flips, shifts)


def warp(images: Tensor, draws: Draws) -> Tensor:
    """Apply crop (resized back to the image's size), mirror and shift.

    Args:
        images: images [N, channels, H, W] with H = W.
        draws: augmentation of B = N images, or B = 1 for all images.

    Returns:
        [N, channels, H, W] in channels-last layout, differentiable in ``images``.
    """
    size = images.shape[-1]
    rows, columns = _axes(size, draws, images.dtype)
    # Resampling in bf16 would change pixels by up to 0.4 %.  In fp32 it costs little compared with the network.
    with torch.autocast(images.device.type, enabled=False):
        warped = rows[:, None] @ images @ columns[:, None].transpose(-1, -2)
    return warped.contiguous(memory_format=torch.channels_last)


def _axes(size: int, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Return the matrices of rows and of columns, [2, B, size, size].

    Row o of a matrix holds the bilinear weights of the source pixels that output pixel o reads.
    """
    # Both axes in one tensor: on a GPU the launches of these small kernels are all they cost.
    start, length = (draws.boxes[..., pair].T[..., None] for pair in (slice(0, 2), slice(2, 4)))
    pixel = torch.arange(size, device=start.device)
    output = (pixel - draws.shifts.T[..., None]) % size
    mirrored = size - 1 - output[1]
    output = torch.stack([output[0], torch.where(draws.flips[:, None], mirrored, output[1])])
    length = length.to(dtype)
    source = ((output + 0.5) * (length / size) - 0.5).clamp_min(0).minimum(length - 1)
    below = source.floor()
    above = (below + 1).minimum(length - 1)
    part = (source - below)[..., None]
    lower, upper = ((start + index).long()[..., None] == pixel for index in (below, above))
    return (1 - part) * lower + part * upper


def mix_boxes(size: int, shares: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a CutMix box for each batch (Yun et al. 2019): area share 1 − λ, center anywhere, cut off at the border.

    Args:
        size: height and width of the images, in pixels.
        shares: λ of each batch, the share that the image keeps: [batches].
        generator: CPU generator.

    Returns:
        [batches, 4] int64: top, bottom, left, right.
    """
    half = ((1 - shares).sqrt() * size / 2).long()
    centre = torch.randint(0, size, (len(shares), 2), generator=generator)
    low, high = (centre - half[:, None]).clamp_min(0), (centre + half[:, None]).clamp_max(size)
    return torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], -1)


def inside(box: Tensor, size: int) -> Tensor:
    """Return the mask [size, size] of a box (top, bottom, left, right), on the box's device."""
    pixel = torch.arange(size, device=box.device)
    top, bottom, left, right = box.unbind(-1)
    return ((pixel >= top) & (pixel < bottom))[:, None] & ((pixel >= left) & (pixel < right))
