"""The objective of the synthesis: terms, targets and the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wmdd.config.schema import SynthesisConfig
from wmdd.networks.frozen import Observation
from wmdd.runtime.team import SINGLE, Team


@dataclass(frozen=True)
class Objective:
    """Weights of the terms: L = feature·L_feature + bn·L_BN + ce·L_CE. The published WMDD objective has ce = 0."""

    feature: float
    bn: float
    ce: float
    per_class: bool = True
    """True for per-class BatchNorm moments (PCBN), False for the teacher's running statistics over the whole group"""
    squared: bool = True
    """True for squared distances summed over classes, False for the plain norms of the public code"""
    bn_first: float = 1.0
    """Extra factor on the first BatchNorm layer"""
    feature_mean: bool = False
    """True to match the weighted mean of a class's features to that of its atoms, False to match each to its atom"""

    @staticmethod
    def from_settings(settings: SynthesisConfig) -> "Objective":
        """Return the objective of the config."""
        return Objective(
            feature=settings.feature_weight,
            bn=settings.bn_weight,
            ce=settings.ce_weight,
            per_class=settings.bn_target == "class",
            squared=settings.norm == "squared",
            bn_first=settings.bn_first_weight,
            feature_mean=settings.feature_target == "mean",
        )


@dataclass(frozen=True)
class Target:
    """Targets of the K images of each of the G classes of a group."""

    labels: Tensor
    """[G·K] int64, class index of each image; images of a class are consecutive"""
    weights: Tensor
    """[G, K], barycenter weights of the images; each row sums to one"""
    mean: Tensor
    """[G, M] BatchNorm means; [1, M] running means for the global target"""
    variance: Tensor
    """[G, M] or [1, M] BatchNorm variances, likewise"""
    atoms: Tensor | None = None
    """[G, K, D] barycenter atoms; None without a feature term"""

    def to(self, device: torch.device) -> "Target":
        """Return the target on a device."""
        atoms = None if self.atoms is None else self.atoms.to(device)
        labels, weights = self.labels.to(device), self.weights.to(device)
        return Target(labels, weights, self.mean.to(device), self.variance.to(device), atoms)

    def part(self, team: Team) -> "Target":
        """Return the target of this rank's images: an equal share of each class on every rank of the team."""
        classes, count = self.weights.shape
        own = own_rows(classes, count, team).view(classes, -1) % count
        atoms = (
            None if self.atoms is None else self.atoms.gather(1, own[..., None].expand(-1, -1, self.atoms.shape[-1]))
        )
        labels = self.labels.view(classes, count).gather(1, own).flatten()
        return Target(labels, self.weights.gather(1, own), self.mean, self.variance, atoms)


def own_rows(classes: int, count: int, team: Team) -> Tensor:
    """Return the rows of this rank among the G·K images of a group: consecutive images of each class."""
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
    objective: Objective, seen: Observation, target: Target, layer_sizes: list[int], team: Team = SINGLE
) -> Loss:
    """Return the loss of the images that ``seen`` observed.

    Each rank of a team sees a part of every class, and sums over images include all ranks. Every rank thus gets the
    loss of the whole group and the gradient of its own images.

    L_feature = Σ_c Σ_k ‖f(x_ck) − b_ck‖²; L_BN = Σ_c Σ_l ‖mean_l − BNmean_cl‖² + ‖var_l − BNvar_cl‖². The moments of a
    class are weighted by the barycenter weights (method section of the paper). With ``feature_mean``, L_feature =
    Σ_c ‖Σ_k w_ck (f(x_ck) − b_ck)‖² (distribution matching by means, Zhao & Bilen 2023). With ``squared`` off, features
    have one Frobenius norm over the group. BatchNorm then has a 2-norm per class and layer, averaged over classes.

    Args:
        objective: weights of the terms.
        seen: teacher's observation of the G·K images, or of this rank's part of them.
        target: targets of the same images.
        layer_sizes: channels of each BatchNorm layer, which sum to M.
        team: ranks among which each class is split.
    """
    zero = seen.features.new_zeros(())
    feature = bn = ce = zero
    if objective.feature and target.atoms is not None:
        gap = seen.features.view_as(target.atoms) - target.atoms
        if objective.feature_mean:
            feature = team.sum((target.weights[..., None] * gap).sum(1)).square().sum()
        else:
            feature = team.sum(gap.square().sum())
        feature = feature if objective.squared else _norm(feature)
    if objective.bn:
        mean, variance = group_moments(seen, target.weights, objective.per_class, team)
        bn = _bn_distance(objective, mean - target.mean, variance - target.variance, layer_sizes)
    if objective.ce:
        ce = team.sum(functional.cross_entropy(seen.logits, target.labels) / team.size)
    return Loss(objective.feature * feature + objective.bn * bn + objective.ce * ce, feature, bn, ce)


def group_moments(seen: Observation, weights: Tensor, per_class: bool, team: Team = SINGLE) -> tuple[Tensor, Tensor]:
    """Return the BatchNorm means and variances over the images of each class, [G, M], or of the group, [1, M].

    The variance is var = Σ w_k var_k + Σ w_k (mean_k − mean)², from per-image moments, without cancellation of digits.
    """
    count = weights.numel()
    shape = (*weights.shape, -1) if per_class else (1, count, -1)
    share = weights[..., None] if per_class else torch.full_like(weights, 1 / (count * team.size)).view(1, -1, 1)
    means, variances = seen.means.view(shape), seen.variances.view(shape)
    mean = team.sum((share * means).sum(1))
    # The variance's derivative by the mean is zero, Σ w_k (mean_k − mean) = 0, but only in the sum over all ranks.
    gaps = means - mean.detach()[:, None]
    return mean, team.sum((share * (variances + gaps.square())).sum(1))


def _norm(square: Tensor) -> Tensor:
    """Return the square root. Its gradient at zero is zero, like a norm's; that of ``sqrt`` alone would be NaN."""
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
