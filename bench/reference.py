"""Plain implementation of the method: the oracle of the tests and the baseline of every speed ratio.

It is written as a careful reader of the paper would write it: eager fp32, contiguous layout, forward hooks on the
BatchNorm layers, torchvision's crop, one term after the other. It shares no code with the engine. It is not slow on
purpose: gradients are computed for the images alone, and nothing is computed twice.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import ot
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms


@dataclass
class ClassTarget:
    """Targets of the K images of one class."""

    label: int
    """Class index"""
    atoms: Tensor
    """[K, D]"""
    weights: Tensor
    """[K], sums to one"""
    means: list[Tensor] = field(default_factory=list)
    """Mean of each BatchNorm input, [channels]"""
    variances: list[Tensor] = field(default_factory=list)
    """Biased variance of each BatchNorm input, [channels]"""

    def double(self) -> "ClassTarget":
        """Return the target in float64."""
        moments = ([one.double() for one in kind] for kind in (self.means, self.variances))
        return ClassTarget(self.label, self.atoms.double(), self.weights.double(), *moments)


class Probe:
    """Forward hooks that keep the inputs of every BatchNorm layer and of the last linear layer."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval()
        self.inputs: list[Tensor] = []
        self.features = torch.empty(0)
        layers = list(self.network.modules())
        for layer in layers:
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(lambda module, arguments, output: self.inputs.append(arguments[0]))
        head = [layer for layer in layers if isinstance(layer, nn.Linear)][-1]
        head.register_forward_hook(lambda module, arguments, output: setattr(self, "features", arguments[0]))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits [N, C]; ``inputs`` and ``features`` are those of these images."""
        self.inputs = []
        logits: Tensor = self.network(images)
        return logits


def class_moments(probe: Probe, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return mean and biased variance of every BatchNorm input over images [n, ...] of a class and positions."""
    with torch.no_grad():
        probe(images)
    means = [inputs.mean((0, 2, 3)) for inputs in probe.inputs]
    variances = [inputs.var((0, 2, 3), correction=0) for inputs in probe.inputs]
    return means, variances


def weighted_moments(inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance [channels] of [K, channels, h, w] where image k has weight w_k."""
    share = weights[:, None, None, None] / (inputs.shape[2] * inputs.shape[3])
    mean = (share * inputs).sum((0, 2, 3))
    return mean, (share * (inputs - mean[:, None, None]) ** 2).sum((0, 2, 3))


def paper_loss(probe: Probe, images: Tensor, targets: Sequence[ClassTarget], bn_weight: float) -> Tensor:
    """Return L = Σ_c Σ_k ‖f(x_ck) − b_ck‖² + λ Σ_c Σ_l (‖mean_l − BNmean_cl‖² + ‖var_l − BNvar_cl‖²).

    Args:
        probe: the hooked teacher.
        images: images [C·K, channels, H, W], sorted by class.
        targets: targets of each class.
        bn_weight: weight λ of the BatchNorm term.
    """
    probe(images)
    loss = images.new_zeros(())
    start = 0
    for target in targets:
        rows = slice(start, start + len(target.atoms))
        loss = loss + ((probe.features[rows] - target.atoms) ** 2).sum()
        for inputs, mean, variance in zip(probe.inputs, target.means, target.variances, strict=True):
            own_mean, own_variance = weighted_moments(inputs[rows], target.weights)
            loss = loss + bn_weight * (((own_mean - mean) ** 2).sum() + ((own_variance - variance) ** 2).sum())
        start = rows.stop
    return loss


def upstream_loss(
    probe: Probe, images: Tensor, targets: Sequence[ClassTarget], bn_weight: float, ce_weight: float
) -> Tensor:
    """Return the loss of the public code: plain norms (not squared), a cross-entropy, uniform weights in the moments.

    Features have one Frobenius norm over the batch. BatchNorm has a 2-norm per class and layer, averaged over classes.
    """
    logits = probe(images)
    feature = torch.linalg.norm(probe.features - torch.cat([target.atoms for target in targets]))
    distance = images.new_zeros(())
    start = 0
    for target in targets:
        rows = slice(start, start + len(target.atoms))
        for inputs, mean, variance in zip(probe.inputs, target.means, target.variances, strict=True):
            own_mean = inputs[rows].mean((0, 2, 3))
            own_variance = inputs[rows].var((0, 2, 3), correction=0)
            distance = distance + torch.linalg.norm(own_mean - mean) + torch.linalg.norm(own_variance - variance)
        start = rows.stop
    labels = torch.cat([torch.full((len(target.atoms),), target.label) for target in targets])
    entropy = functional.cross_entropy(logits, labels.to(images.device))
    return feature + bn_weight * distance / len(targets) + ce_weight * entropy


def augmented(images: Tensor, box: Sequence[int], flip: bool, shift: Sequence[int]) -> Tensor:
    """Return the batch after one crop (resized to the full size), one flip and one roll.

    Args:
        images: images [N, channels, H, W].
        box: top, left, height, width of the crop, in pixels.
        flip: whether to mirror left to right.
        shift: cyclic shift down and right, in pixels.
    """
    top, left, height, width = box
    size = list(images.shape[-2:])
    cropped = transforms.resized_crop(images, top, left, height, width, size, antialias=True)
    if flip:
        cropped = cropped.flip(-1)
    return torch.roll(cropped, list(shift), (-2, -1))


LossOf = Callable[[Probe, Tensor, Sequence[ClassTarget]], Tensor]
"""A loss of the images of all classes, such as ``paper_loss`` with its weights filled in."""


@dataclass(frozen=True)
class Views:
    """Augmentation of an iteration: torchvision's random resized crop, a flip, a roll."""

    scale: tuple[float, float]
    """Range of the area that a crop keeps"""
    flip: bool
    """Whether to mirror with probability one half"""
    jitter: int
    """Largest roll along each axis, in pixels"""
    each: bool = False
    """True for one view per image, False for one view for the whole batch"""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the augmented batch [N, channels, H, W]. Random numbers come from torch's global generator."""
        if self.each:
            return torch.cat([self._one(image[None]) for image in images])
        return self._one(images)

    def _one(self, images: Tensor) -> Tensor:
        crop = RandomResizedCrop(images.shape[-2:], self.scale)
        box = crop.make_params([images])
        flip = self.flip and bool(torch.rand(()) < 0.5)
        shift = torch.randint(-self.jitter, self.jitter + 1, (2,)).tolist()
        return augmented(images, [box[key] for key in ("top", "left", "height", "width")], flip, shift)


def synthesize(
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    views: Views,
    iterations: int,
    lr: float,
    betas: tuple[float, float],
    limits: tuple[Tensor, Tensor] | None,
    advance: Callable[[int], None] = lambda iterations: None,
) -> Tensor:
    """Return the images after ``iterations`` steps of Adam with a cosine schedule, with a new view in each step.

    Args:
        images: normalized images [C·K, channels, H, W], sorted by class.
        loss_of: returns the loss of the images; the weights of its network need no gradients.
        views: random crop, flip and roll.
        iterations: number of steps.
        lr: peak learning rate.
        betas: betas of Adam.
        limits: smallest and largest pixel value, each [channels, 1, 1]; None leaves pixels free.
        advance: called after each step.
    """
    images = images.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=lr, betas=betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss_of(views(images)).backward()
        optimizer.step()
        schedule.step()
        if limits is not None:
            with torch.no_grad():
                images.clamp_(*limits)
        advance(1)
    return images.detach()


def pot_barycenter(features: Tensor, count: int, seed: int) -> float:
    """Return W2² between a class and its barycenter by POT's solver, with POT's default limits, from random points.

    POT uses one thread, like the engine.

    Args:
        features: features [n, D], on the CPU.
        count: number K of atoms, each of weight 1/K.
        seed: random seed of the start.
    """
    points = features.double().numpy()
    mass, weights = ot.unif(len(points)), ot.unif(count)
    start = points[np.random.default_rng(seed).choice(len(points), count, replace=False)]
    with threadpool_limits(limits=1):
        atoms = ot.lp.free_support_barycenter([points], [mass], start)
        return float(ot.emd2(weights, mass, ot.dist(atoms, points)))
