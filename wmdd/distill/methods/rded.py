"""RDED: crops of real images that the teacher finds realistic, stitched together."""

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import resize

from wmdd.distill.methods.base import ClassData, ClassPlan, Method


class RDED(Method):
    """RDED (Sun et al. 2024): the real crops with the surest teacher, stitched 2x2 from 128 px on.

    Each of at most 300 images gives five square crops of 8 to 100 % of its area. A crop is resized to its final size,
    and scored by the teacher's cross-entropy on a canvas of the mean color, as in the published code.

    The best crop of every image is used first, so that tiles come from distinct images. Second crops follow only when
    every image has given its first.

    Images below 128 px are one crop each, as in the published scripts (CIFAR, Tiny-ImageNet). So are images with an odd
    side, which two tiles do not fill. Labels are those of the run, as for any method. Crops are cut from the images
    decoded at the run's resolution.
    """

    uses_statistics = False

    def prepare(self, data: ClassData) -> ClassPlan:
        """Draw, score and stitch the crops."""
        side = self.config.data.resolution
        factor = 2 if side >= self.config.rded.stitched_from and side % 2 == 0 else 1
        return ClassPlan(stitch(best_crops(data, side // factor, self.config.ipc * factor**2), factor))


def best_crops(data: ClassData, size: int, count: int) -> Tensor:
    """Draw crops of the images of a class, and return those with the surest teacher: [count, channels, size, size]."""
    side, own = data.config.data.resolution, data.config.rded
    source = data.generator("rded")
    images = data.decode(torch.randperm(data.count, generator=source)[: own.candidates].tolist())
    tiles, scores = [], []
    for _ in range(max(own.crops, -(-count // len(images)))):
        crops = torch.stack([_crop(image, size, own.smallest_crop, source) for image in images])
        before, after = (side - size) // 2, side - size - (side - size) // 2
        seen = data.observe(functional.pad(crops, (before, after, before, after)))
        classes = torch.full((len(crops),), data.index)
        tiles.append(crops)
        scores.append(functional.cross_entropy(seen.logits, classes, reduction="none"))
    return torch.stack(tiles).flatten(0, 1)[rank(torch.stack(scores))[:count]]


def rank(scores: Tensor) -> Tensor:
    """Return the flat positions of crops, best first: [rounds · n] int64.

    The best crop of every image comes before the second best of any. Among crops of one rank, the least score comes
    first, then the earlier image.

    Args:
        scores: cross-entropy [rounds, n] of each crop of n images.
    """
    order = scores.argsort(dim=0, stable=True)  # [r, i]: which crop of image i is its r-th best
    sorted_scores = scores.gather(0, order)
    images = sorted_scores.argsort(dim=1, stable=True)  # [r, j]: which image comes j-th in round r
    return (order.gather(1, images) * scores.shape[1] + images).flatten()


def stitch(tiles: Tensor, factor: int) -> Tensor:
    """Lay factor² tiles on each of K canvases: [factor²·K, channels, s, s] to [K, channels, factor·s, factor·s].

    The best K tiles lie top left, the next K top right, and so on. Every canvas thus has one of the best tiles.
    """
    rows = tiles.unflatten(0, (factor, factor, -1))
    return torch.cat([torch.cat(list(row), -1) for row in rows], -2)


def _crop(image: Tensor, size: int, smallest: float, source: torch.Generator) -> Tensor:
    """Cut a random square of at least a share of the area, and resize it with antialiasing: [channels, size, size]."""
    side = image.shape[-1]
    share, down, right = torch.rand(3, generator=source, dtype=torch.float64).tolist()
    length = max(1, round(side * (smallest + (1 - smallest) * share) ** 0.5))
    top, left = (int(part * (side - length + 1)) for part in (down, right))
    return resize(image[:, top : top + length, left : left + length], [size, size], antialias=True)
