"""Plain implementation of a student's training: a new DataLoader in each epoch, a teacher pass in every step.

Processes of the DataLoader pass every image separately through torchvision's transforms. A batch is mixed by CutMix,
and the teacher labels the mixed images. Hard labels are the classes of both images of a mix. The training is eager
fp32, contiguous layout, AdamW with torch's own schedule. It shares no code with the engine, and is not slow on purpose.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    stretch: float
    """Length of the cosine schedule, in multiples of the training"""
    soft: bool
    """True for the teacher's logits at a temperature, False for classes"""
    temperature: float
    crop_scale: float
    """Smallest share of the area that a crop keeps"""
    flip: bool
    mix: str
    """cutmix, mixup or none"""
    mix_alpha: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Pictures(Dataset[tuple[Tensor, int]]):
    """uint8 images that are cropped, flipped and normalized one by one.

    Args:
        images: images [N, channels, H, W] uint8.
        labels: class indices [N] int64.
        recipe: recipe of the student.
    """

    def __init__(self, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        self._images, self._labels = images, labels
        steps: list[Callable[..., Tensor]] = [
            transforms.RandomResizedCrop(images.shape[-1], (recipe.crop_scale, 1.0), antialias=True),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
        if recipe.flip:
            steps.insert(1, transforms.RandomHorizontalFlip())
        self._transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def train(
    student: nn.Module,
    teacher: nn.Module,
    pictures: Pictures,
    recipe: Recipe,
    workers: int,
    device: torch.device,
    updates: int,
    advance: Callable[[int], None] = lambda updates: None,
) -> None:
    """Train a student in place.

    Args:
        student: untrained network.
        teacher: frozen classifier.
        pictures: distilled images.
        recipe: recipe of the student.
        workers: number of processes of the DataLoader.
        device: device of both networks.
        updates: number of optimizer steps.
        advance: called after each step.
    """
    optimizer = torch.optim.AdamW(student.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / (recipe.epochs * recipe.stretch)))
    )
    student.train()
    done = 0
    while done < updates:
        for images, classes in DataLoader(pictures, recipe.batch_size, shuffle=True, num_workers=workers):
            if len(images) < 2:
                continue  # BatchNorm cannot train on one image
            images, classes = images.to(device), classes.to(device)
            mixed, partners, share = mix(images, recipe)
            update(student, teacher, optimizer, recipe, mixed, classes, classes[partners], share)
            done += 1
            advance(1)
            if done == updates:
                return
        schedule.step()


def mix(images: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, float]:
    """Return the mixed batch, the partner of each image, and the image's own share (CutMix, Yun et al. 2019)."""
    partners = torch.randperm(len(images), device=images.device)
    if recipe.mix == "none":
        return images, partners, 1.0
    share = float(torch.distributions.Beta(recipe.mix_alpha, recipe.mix_alpha).sample())
    if recipe.mix == "mixup":
        return share * images + (1 - share) * images[partners], partners, share
    size = images.shape[-1]
    half = int(size * math.sqrt(1 - share) / 2)
    row, column = torch.randint(size, (2,)).tolist()
    top, bottom = max(row - half, 0), min(row + half, size)
    left, right = max(column - half, 0), min(column + half, size)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    return images, partners, 1 - (bottom - top) * (right - left) / size**2


def update(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    images: Tensor,
    classes: Tensor,
    others: Tensor,
    share: float,
) -> Tensor:
    """Take one optimizer step on a mixed batch and return its loss.

    Args:
        student: network to train.
        teacher: classifier that labels the batch in the soft regime.
        optimizer: optimizer of the student.
        recipe: recipe with regime and temperature.
        images: mixed images [b, channels, H, W].
        classes: class of each image, [b].
        others: class of each image's partner in the mix, [b].
        share: λ, the share of the image itself in the mix.
    """
    logits = student(images)
    if recipe.soft:
        with torch.no_grad():
            wanted = functional.softmax(teacher(images) / recipe.temperature, 1)
        own = functional.log_softmax(logits / recipe.temperature, 1)
        loss = functional.kl_div(own, wanted, reduction="batchmean") * recipe.temperature**2
    else:
        entropy = functional.cross_entropy
        loss = share * entropy(logits, classes) + (1 - share) * entropy(logits, others)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
