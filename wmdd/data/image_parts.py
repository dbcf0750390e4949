"""Images that lie in several tensors, such as memory-mapped files, and are taken batch by batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageParts:
    """Images in several tensors, in order: ``N`` images, [N, channels, H, W] uint8.

    Args:
        parts: tensors [n, channels, H, W] on the CPU; at least one.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        counts = torch.tensor([len(part) for part in self._parts])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        """Size of the images in bytes."""
        return sum(part.nbytes for part in self._parts)

    def __getitem__(self, positions: Tensor) -> Tensor:
        """Return the images at some positions [n]: [n, channels, H, W] on the CPU."""
        if len(self._parts) == 1:
            return self._parts[0][positions]
        owners = torch.searchsorted(self._ends, positions, right=True)
        rows = positions - self._starts[owners]
        taken = [self._parts[owner][row] for owner, row in zip(owners.tolist(), rows.tolist(), strict=True)]
        return torch.stack(taken)

    def joined(self, device: torch.device | str = "cpu") -> Tensor:
        """Return all images in one tensor.  A single part on this device is not copied."""
        if len(self._parts) == 1:
            return self._parts[0].to(device)
        out = torch.empty((len(self), *self._parts[0].shape[1:]), dtype=torch.uint8, device=device)
        for part, start, end in zip(self._parts, self._starts.tolist(), self._ends.tolist(), strict=True):
            out[start:end] = part
        return out


def near(images: Tensor | ImageParts, device: torch.device) -> Tensor | ImageParts:
    """Return the images on the GPU if they fit in a quarter of its free memory, else unchanged.

    Images elsewhere are copied batch by batch (``take``).
    """
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
        return images.joined(device) if isinstance(images, ImageParts) else images.to(device)
    return images


def take(images: Tensor | ImageParts, positions: Tensor) -> Tensor:
    """Return the images at some positions [n], on the device of the positions: [n, channels, H, W]."""
    if isinstance(images, Tensor) and images.device == positions.device:
        return images[positions]
    return to_device(images[positions.cpu()], positions.device)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Return images or logits of the CPU on a device.  The host does not wait for the copy."""
    if images.device.type == device.type:
        return images
    return (images if images.is_pinned() else images.pin_memory()).to(device, non_blocking=True)
