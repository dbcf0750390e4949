"""Plain implementation of the class statistics: two passes over the files of a class, each with its own DataLoader.

The structure is that of the paper's public code. A first pass of the teacher gives the features, a second the inputs of
the BatchNorm layers. Both use forward hooks, eager fp32 and contiguous layout. Images go through torchvision's
transforms one by one. The moments are exact over the class. The code shares nothing with the engine, and is not slow on
purpose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.reference import Probe


class Files(Dataset[Tensor]):
    """Images that are read and transformed on access.

    Args:
        read: returns the image at a position.
        positions: positions of the images.
        transform: turns a PIL image into a float tensor.
    """

    def __init__(
        self, read: Callable[[int], Image.Image], positions: Sequence[int], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self._read, self._positions, self._transform = read, positions, transform

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Tensor:
        return self._transform(self._read(self._positions[index]))


def transform_of(
    resolution: int, crop_ratio: float, channels: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """Return torchvision's usual evaluation transform: resize, center crop, scale to [0, 1], normalize."""
    return transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("L" if channels == 1 else "RGB")),
            transforms.Resize(round(resolution / crop_ratio)),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


@dataclass(frozen=True)
class ClassSums:
    """Features and BatchNorm moments of the n images of one class."""

    features: Tensor
    """[n, D]"""
    means: list[Tensor]
    """Mean of each BatchNorm input over images and positions, [channels]"""
    variances: list[Tensor]
    """Biased variance of each BatchNorm input, [channels]"""


def class_statistics(
    probe: Probe,
    files: Files,
    batch_size: int,
    workers: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda batches: None,
) -> ClassSums:
    """Return features and BatchNorm moments of one class.

    Args:
        probe: the hooked teacher.
        files: images of the class.
        batch_size: number of images in one forward pass.
        workers: number of processes of each DataLoader.
        device: device of the teacher.
        advance: called with 1 after each batch of each pass.
    """
    features = []
    for images in DataLoader(files, batch_size, num_workers=workers):
        with torch.no_grad():
            probe(images.to(device))
        features.append(probe.features.cpu())
        advance(1)

    count = 0
    first: list[Tensor] = []
    second: list[Tensor] = []
    for images in DataLoader(files, batch_size, num_workers=workers):
        with torch.no_grad():
            probe(images.to(device))
        means = [inputs.mean((0, 2, 3)).double() for inputs in probe.inputs]
        variances = [inputs.var((0, 2, 3), correction=0).double() for inputs in probe.inputs]
        if not count:
            first, second = ([torch.zeros_like(mean) for mean in means] for _ in range(2))
        for layer, (mean, variance) in enumerate(zip(means, variances, strict=True)):
            first[layer] += len(images) * mean
            second[layer] += len(images) * (variance + mean**2)
        count += len(images)
        advance(1)
    means = [total / count for total in first]
    variances = [total / count - mean**2 for total, mean in zip(second, means, strict=True)]
    return ClassSums(torch.cat(features), means, variances)
