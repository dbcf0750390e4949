"""The objective of WMDD and the engine that optimises images against it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from wmdd import augment
from wmdd.config import Synthesis
from wmdd.distributed import ALONE, Ranks, Team, generator
from wmdd.errors import Interrupted
from wmdd.networks import FrozenNetwork, Observation


@dataclass(frozen=True)
class Objective:
    """Which terms are matched: L = feature·L_feature + bn·L_BN + ce·L_CE (WMDD, the published objective has no CE)."""

    feature: float
    bn: float
    ce: float
    per_class: bool = True
    """Per-class BatchNorm moments (PCBN), or the teacher's running statistics over the whole group"""
    squared: bool = True
    """Squared distances summed over classes, or the plain norms of the public code"""
    bn_first: float = 1.0
    """Extra factor on the first BatchNorm layer"""

    @staticmethod
    def of(settings: Synthesis) -> "Objective":
        """Return the objective that the config asks for."""
        return Objective(
            feature=settings.feature_weight,
            bn=settings.bn_weight,
            ce=settings.ce_weight,
            per_class=settings.bn_target == "class",
            squared=settings.norm == "squared",
            bn_first=settings.bn_first_weight,
        )


@dataclass(frozen=True)
class Target:
    """What the K images of each of the G classes of a group are optimised against."""

    labels: Tensor
    """[G·K] int64, class index of each image; images of a class lie together"""
    weights: Tensor
    """[G, K], barycenter weights of the images; each row sums to one"""
    mean: Tensor
    """[G, M] BatchNorm means; [1, M] running means for the global target"""
    variance: Tensor
    """[G, M] or [1, M], likewise"""
    atoms: Tensor | None = None
    """[G, K, D] barycenter atoms, or None where no feature term is asked for"""

    def to(self, device: torch.device) -> "Target":
        """Return the target on a device."""
        atoms = None if self.atoms is None else self.atoms.to(device)
        labels, weights = self.labels.to(device), self.weights.to(device)
        return Target(labels, weights, self.mean.to(device), self.variance.to(device), atoms)

    def part(self, team: Team) -> "Target":
        """Return the target of this rank's images: as many of each class on every rank of the team."""
        classes, count = self.weights.shape
        own = own_rows(classes, count, team).view(classes, -1) % count
        atoms = (
            None if self.atoms is None else self.atoms.gather(1, own[..., None].expand(-1, -1, self.atoms.shape[-1]))
        )
        labels = self.labels.view(classes, count).gather(1, own).flatten()
        return Target(labels, self.weights.gather(1, own), self.mean, self.variance, atoms)


def own_rows(classes: int, count: int, team: Team) -> Tensor:
    """Return which of the G·K images of a group this rank holds: consecutive ones of each class."""
    share = count // team.size
    return torch.arange(classes * count).view(classes, count)[:, team.rank * share : (team.rank + 1) * share].flatten()


@dataclass(frozen=True)
class Loss:
    """The value of the objective and its unweighted terms, each a scalar."""

    total: Tensor
    feature: Tensor
    bn: Tensor
    ce: Tensor


def evaluate(
    objective: Objective, seen: Observation, target: Target, layer_sizes: list[int], team: Team = ALONE
) -> Loss:
    """Return the objective for the images that ``seen`` observed.

    The ranks of a team each see a part of every class; sums over images run over all of them, so that every rank holds
    the loss of the whole group and the gradient of its own images.

    L_feature = Σ_c Σ_k ‖f(x_ck) − b_ck‖²;  L_BN = Σ_c Σ_l ‖mean_l − BNmean_cl‖² + ‖var_l − BNvar_cl‖², with the class's
    moments weighted by the barycenter weights (method section of the paper).  With ``squared`` off: one Frobenius norm
    over the group for features, and for BatchNorm a 2-norm per class and layer, averaged over classes.

    Args:
        objective: weights of the terms.
        seen: of G·K images, or of this rank's part of them.
        target: of the same images.
        layer_sizes: channels of each BatchNorm layer, which sum to M.
        team: the ranks among which each class is split.
    """
    zero = seen.features.new_zeros(())
    feature = bn = ce = zero
    if objective.feature and target.atoms is not None:
        gap = seen.features.view_as(target.atoms) - target.atoms
        feature = team.sum(gap.square().sum())
        feature = feature if objective.squared else _norm(feature)
    if objective.bn:
        mean, variance = group_moments(seen, target.weights, objective.per_class, team)
        bn = _bn_distance(objective, mean - target.mean, variance - target.variance, layer_sizes)
    if objective.ce:
        ce = team.sum(functional.cross_entropy(seen.logits, target.labels) / team.size)
    return Loss(objective.feature * feature + objective.bn * bn + objective.ce * ce, feature, bn, ce)


def group_moments(seen: Observation, weights: Tensor, per_class: bool, team: Team = ALONE) -> tuple[Tensor, Tensor]:
    """Return the BatchNorm means and variances over the images of each class, [G, M], or of the group, [1, M].

    From per-image moments: var = Σ w_k var_k + Σ w_k (mean_k − mean)², which loses no digits to cancellation.
    """
    count = weights.numel()
    shape = (*weights.shape, -1) if per_class else (1, count, -1)
    share = weights[..., None] if per_class else torch.full_like(weights, 1 / (count * team.size)).view(1, -1, 1)
    means, variances = seen.means.view(shape), seen.variances.view(shape)
    mean = team.sum((share * means).sum(1))
    # The variance's derivative by the mean is zero, Σ w_k (mean_k − mean) = 0, and only in the sum over all ranks.
    gaps = means - mean.detach()[:, None]
    return mean, team.sum((share * (variances + gaps.square())).sum(1))


def _norm(square: Tensor) -> Tensor:
    """Return the square root, with the gradient of a norm at zero: zero, where that of the root alone is NaN."""
    nothing = square == 0
    return square.masked_fill(nothing, 1).sqrt().masked_fill(nothing, 0)


def _bn_distance(objective: Objective, mean: Tensor, variance: Tensor, layer_sizes: list[int]) -> Tensor:
    gaps = torch.stack([mean, variance])
    if objective.squared:
        rest = gaps.square().sum()
        first = gaps[..., : layer_sizes[0]].square().sum() if objective.bn_first != 1 else 0.0
    else:
        norms = torch.stack([layer.norm(dim=-1) for layer in gaps.split(layer_sizes, -1)])
        rest = norms.mean(-1).sum()
        first = norms[0].mean(-1).sum()
    return rest + (objective.bn_first - 1) * first


@dataclass
class State:
    """Where the synthesis of a group stands: all that is needed to go on from here."""

    images: Tensor
    """[N, channels, H, W] float32, normalised"""
    iteration: int = 0
    first: Tensor | None = None
    """Adam's first moment, like ``images``; None at the start"""
    second: Tensor | None = None
    """Adam's second moment"""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """Loss terms at the iterations listed under ``iteration``"""


def synthesise(
    network: FrozenNetwork,
    state: State,
    target: Target,
    objective: Objective,
    settings: Synthesis,
    limits: tuple[Tensor, Tensor],
    seed: tuple[object, ...],
    ranks: Ranks,
    team: Team = ALONE,
    advance: Callable[[int], None] = lambda iterations: None,
    save: Callable[[State], None] | None = None,
    due: Callable[[], bool] = lambda: False,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Optimise the images of one group against its target.

    Adam on the images with a cosine schedule to zero, each iteration seeing them through a random crop, flip and roll;
    pixels are clamped to ``limits`` after each step.  All draws follow from ``seed`` and the iteration, so a resumed
    synthesis equals an uninterrupted one.

    Args:
        network: the frozen teacher.
        state: where to start; its images are [G·K, channels, H, W].
        target: what to match.
        objective: how.
        settings: iterations, learning rate, augmentation.
        limits: smallest and largest normalised pixel value, each [channels, 1, 1].
        seed: names the group; given to ``seed_of``.
        ranks: device and precision, and whether steps are compiled.
        team: the ranks that hold the images of each class together; all get the whole state and return it.
        advance: called with the number of iterations done.
        save: writes a checkpoint; called when ``due()`` or ``stop()`` says so.
        due: whether a checkpoint is wanted now.
        stop: whether to checkpoint and leave.

    Returns:
        the final state, on the CPU.

    Raises:
        Interrupted: ``stop`` asked for it; the state was saved.
    """
    device = ranks.device
    classes, count = target.weights.shape
    rows = own_rows(classes, count, team)
    target = target.part(team).to(device)
    low, high = (limit.to(device) for limit in limits)
    images = state.images[rows].to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=settings.lr, betas=settings.betas, fused=True)
    if state.first is not None and state.second is not None:
        step = torch.tensor(float(state.iteration), device=device)
        moments = {"exp_avg": state.first[rows].to(device), "exp_avg_sq": state.second[rows].to(device)}
        optimizer.state[images] = {"step": step, **moments}
    draws = _schedule(settings, classes * count, images.shape[-1], seed, rows).to(device)
    sizes = network.layer_sizes

    def loss_of(pixels: Tensor, boxes: augment.Draws) -> Loss:
        with ranks.autocast():
            seen = network(augment.warp(pixels, boxes))
        return evaluate(objective, seen, target, sizes, team)

    def whole(part: Tensor) -> Tensor:
        out = torch.empty(classes * count, *part.shape[1:], dtype=part.dtype)
        for rank, piece in enumerate(team.gather(part.detach())):
            out[own_rows(classes, count, replace(team, rank=rank))] = piece.cpu()
        return out

    step_loss = ranks.compiled(loss_of)
    every = max(1, settings.iterations // 50)
    logged: list[tuple[int, Loss]] = []

    def snapshot(iteration: int) -> State:
        moments = optimizer.state.get(images, {})
        curve = {name: list(values) for name, values in state.curve.items()}
        for index, loss in logged:
            for name, value in {"iteration": float(index), **vars(loss)}.items():
                curve.setdefault(name, []).append(float(value))
        first, second = (whole(moments[name]) if name in moments else None for name in ("exp_avg", "exp_avg_sq"))
        return State(whole(images), iteration, first, second, curve)

    for iteration in range(state.iteration, settings.iterations):
        if save:
            stopping, saving = team.anyone(stop(), due())
            if stopping or saving:
                save(snapshot(iteration))
            if stopping:
                raise Interrupted(f"checkpointed at iteration {iteration} of {settings.iterations}")
        loss = step_loss(images, draws[iteration])
        (images.grad,) = torch.autograd.grad(loss.total, images)
        optimizer.param_groups[0]["lr"] = settings.lr * _cosine(iteration / settings.iterations)
        optimizer.step()
        if settings.clamp:
            with torch.no_grad():
                images.clamp_(low, high)
        if iteration % every == 0 or iteration == settings.iterations - 1:
            logged.append((iteration, Loss(*(value.detach() for value in vars(loss).values()))))
        advance(1)
    return snapshot(settings.iterations)


def _schedule(
    settings: Synthesis, count: int, size: int, seed: tuple[object, ...], rows: Tensor | None = None
) -> augment.Draws:
    """Draw all crops, flips and rolls of a synthesis: [iterations, 1 or N], then those of the given rows."""
    grouped = settings.augment == "group"
    shape = (settings.iterations, 1 if grouped else count)
    low, high = settings.crop_scale
    smallest: float | Tensor = low
    if settings.crop_curriculum:
        # CDA (Yin & Shen 2023): from global views to local ones, along a cosine.
        progress = torch.arange(shape[0]) / max(1.0, settings.crop_curriculum * shape[0])
        smallest = high - (high - low) * (1 - torch.cos(torch.pi * progress.clamp_max(1.0)))[:, None] / 2
    draws = augment.draw(shape, size, (smallest, high), settings.flip, settings.jitter, generator(*seed, "augment"))
    if grouped or rows is None:
        return draws
    return augment.Draws(draws.boxes[:, rows], draws.flips[:, rows], draws.shifts[:, rows])


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
