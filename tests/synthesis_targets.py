"""The same targets for the engine and for the plain reference."""

import torch
from torch import Tensor, nn

from bench import reference
from wmdd.distill.synthesis.objective import Target

CLASSES, COUNT = 2, 3


def targets(
    classifier: nn.Module, weights: Tensor | None = None, count: int = COUNT
) -> tuple[Target, list[reference.ClassTarget]]:
    """Return the same targets for the engine and for the reference."""
    torch.manual_seed(3)
    probe = reference.Probe(classifier)
    plain = []
    for label in (4, 1):
        means, variances = reference.class_moments(probe, torch.randn(9, 3, 16, 16) * 1.5 + 0.2)
        share = torch.full((count,), 1 / count) if weights is None else weights
        plain.append(reference.ClassTarget(label, torch.rand(count, 32), share, means, variances))
    target = Target(
        labels=torch.tensor([4] * count + [1] * count),
        weights=torch.stack([one.weights for one in plain]),
        mean=torch.stack([torch.cat(one.means) for one in plain]),
        variance=torch.stack([torch.cat(one.variances) for one in plain]),
        atoms=torch.stack([one.atoms for one in plain]),
    )
    return target, plain
