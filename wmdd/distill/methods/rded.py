"""RDED: crops of real images that the teacher finds realistic, stitched together."""

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import resize

from wmdd.distill.methods.base import ClassData, ClassPlan, Method

CANDIDATES = 300
"""Most real images of a class whose crops are scored (``mipc`` of the published scripts)."""
CROPS = 5
"""Crops of each of them (``num_crop``); more only where a class has too few images to fill K canvases."""
STITCHED_FROM = 128
"""Side from which four crops share a canvas, in pixels."""


class RDED(Method):
    """RDED (Sun et al. 2024): the real crops that the teacher is surest of, stitched 2x2 from 128 px on.

    From each of at most 300 images, five square crops of 8 to 100 % of the area are resized to the size at which they
    are stored and scored by the teacher's cross-entropy, on a canvas of the mean colour as in the published code.  Of
    each image the best crop counts, so that the tiles come from distinct images; a second crop of an image is taken
    only when all images have given their first.  As in the published scripts, images of less than 128 px are one crop
    each (CIFAR, Tiny-ImageNet), and so are those of an odd side, which two tiles do not fill.  Students learn from the
    class or from the teacher's view of the canvas, as for any method; crops are cut from the decoded images of the run.
    """

    uses_statistics = False

    def prepare(self, data: ClassData) -> ClassPlan:
        """Draw, score and stitch the crops."""
        side = self.config.data.resolution
        factor = 2 if side >= STITCHED_FROM and side % 2 == 0 else 1
        needed = self.config.ipc * factor**2
        source = data.generator("rded")
        images = data.decode(torch.randperm(data.count, generator=source)[:CANDIDATES].tolist())
        rounds = max(CROPS, -(-needed // len(images)))
        tiles, scores = [], []
        for _ in range(rounds):
            crops = torch.stack([_crop(image, side // factor, source) for image in images])
            margin = side - side // factor
            before, after = margin // 2, margin - margin // 2
            seen = data.observe(functional.pad(crops, (before, after, before, after)))
            classes = torch.full((len(crops),), data.index)
            tiles.append(crops)
            scores.append(functional.cross_entropy(seen.logits, classes, reduction="none"))
        best = rank(torch.stack(scores))[:needed]
        return ClassPlan(stitch(torch.stack(tiles).flatten(0, 1)[best], factor))


def rank(scores: Tensor) -> Tensor:
    """Return the flat positions of crops, the one to take first in front: [rounds · n] int64.

    The best crop of every image comes before the second best of any; of equal rank, the least score comes first, and
    of equal scores the earlier image.

    Args:
        scores: [rounds, n], the cross-entropy of each crop of n images.
    """
    order = scores.argsort(dim=0, stable=True)  # [r, i]: which crop of image i is its r-th best
    sorted_scores = scores.gather(0, order)
    images = sorted_scores.argsort(dim=1, stable=True)  # [r, j]: which image comes j-th in round r
    return (order.gather(1, images) * scores.shape[1] + images).flatten()


def stitch(tiles: Tensor, factor: int) -> Tensor:
    """Lay factor² tiles on each of K canvases: [factor²·K, channels, s, s] to [K, channels, factor·s, factor·s].

    The best K tiles lie top left, the next K top right, and so on, so that every canvas has one of the best.
    """
    rows = tiles.unflatten(0, (factor, factor, -1))
    return torch.cat([torch.cat(list(row), -1) for row in rows], -2)


def _crop(image: Tensor, size: int, source: torch.Generator) -> Tensor:
    """Cut a square of 8 to 100 % of the area at random, and resize it with antialiasing: [channels, size, size]."""
    side = image.shape[-1]
    share, down, right = torch.rand(3, generator=source, dtype=torch.float64).tolist()
    length = max(1, round(side * (0.08 + 0.92 * share) ** 0.5))
    top, left = (int(part * (side - length + 1)) for part in (down, right))
    return resize(image[:, top : top + length, left : left + length], [size, size], antialias=True)
