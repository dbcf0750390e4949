"""Losses and gradients of the synthesis on the device, compared with float64 on the CPU."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wmdd.config.schema import SynthesisConfig
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Objective, Target
from wmdd.networks import create
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.seeding import generator
from wmdd.selftest.rows import Precision, Verdict, Workplace, section, verdict


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences from float64."""

    loss: float
    """Of any loss along one trajectory, relative to the first loss"""
    gradient: float
    """Of the first gradient: norm of the difference, relative to the norm"""


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-5, 1e-4),
    "tf32": Tolerance(1e-3, 1e-2),
    "bf16": Tolerance(5e-3, 5e-2),
}
"""Tolerances of each precision.  They tell fp32 from TF32, which rounds to 11 bits, and TF32 from bf16, to 8 bits."""
FINITE_DIFFERENCE_TOLERANCE = 1e-4
"""Largest relative difference of the float64 gradient from finite differences of the float64 loss."""

_CLASSES, _COUNT, _PIXELS, _ITERATIONS, _STEP, _DIRECTIONS = 2, 4, 16, 20, 1e-6, 6
_BETA = 0.5


def compare(place: Workplace, precision: Precision, compiled: bool = False) -> Verdict:
    """Compare the losses of one trajectory and the first gradient on the device with float64 on the CPU.

    The float64 gradient itself is compared with finite differences of the loss, which use no backward pass.
    """
    exact = place.once("float64", lambda: _trajectory(_problem(), _images().double(), _plain()))
    by_differences = place.once("differences", lambda: _distance_from_differences(exact[1]))
    with ranks(section(place, precision, compiled)) as job:
        losses, gradient = _trajectory(_problem(), _images(), job)
    allowed = TOLERANCES[precision]
    loss_gap = float((losses - exact[0]).abs().max() / exact[0][0])
    gradient_gap = float((gradient.double() - exact[1]).norm() / exact[1].norm())
    passed = (
        by_differences <= FINITE_DIFFERENCE_TOLERANCE
        and loss_gap <= allowed.loss  # false for NaN
        and gradient_gap <= allowed.gradient
    )
    return verdict(
        passed,
        f"loss {loss_gap:.0e} (at most {allowed.loss:.0e}) and gradient {gradient_gap:.0e} (at most"
        f" {allowed.gradient:.0e}) from float64; float64 {by_differences:.0e} (at most"
        f" {FINITE_DIFFERENCE_TOLERANCE:.0e}) from finite differences",
        loss=loss_gap,
        gradient=gradient_gap,
        finite_differences=by_differences,
    )


def _problem() -> Problem:
    """Return a problem of all terms, on the CPU, with a small random network."""
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        network = create.create("convnet2x8", 5, 3, _PIXELS)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                nn.init.normal_(layer.running_mean, std=0.3)
                nn.init.uniform_(layer.running_var, 0.5, 2)
    frozen = FrozenNetwork(network)
    source = generator("selftest", "target")
    size = sum(frozen.layer_sizes)
    target = Target(
        labels=torch.arange(_CLASSES).repeat_interleave(_COUNT),
        weights=torch.full((_CLASSES, _COUNT), 1 / _COUNT),
        mean=torch.randn(_CLASSES, size, generator=source) * 0.3,
        variance=torch.rand(_CLASSES, size, generator=source) + 0.5,
        atoms=torch.rand(_CLASSES, _COUNT, frozen.feature_size, generator=source),
    )
    settings = SynthesisConfig(iterations=_ITERATIONS, lr=0.05, augment="image", crop_scale=(0.5, 1.0), jitter=2)
    limits = torch.full((3, 1, 1), -3.0), torch.full((3, 1, 1), 3.0)
    return Problem(frozen, Objective(1.0, 10.0, 1.0), target, settings, limits, ("selftest",))


def _images() -> Tensor:
    return torch.randn(_CLASSES * _COUNT, 3, _PIXELS, _PIXELS, generator=generator("selftest", "images"))


def _plain() -> Ranks:
    """Return a single rank on the CPU, whatever the machine has."""
    return Ranks(0, 1, torch.device("cpu"), Arithmetic("cpu", "fp32", False, True, 1))


def _trajectory(problem: Problem, images: Tensor, job: Ranks, until: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss of each iteration [iterations] in float64, and the first gradient of the images, on the CPU.

    The arithmetic follows from the type of ``images``.  Adam's first moment after one step is (1 − β1) times the
    gradient.
    """
    kind = images.dtype
    target = problem.target
    atoms = None if target.atoms is None else target.atoms.to(kind)
    cast = Target(target.labels, target.weights.to(kind), target.mean.to(kind), target.variance.to(kind), atoms)
    network = problem.network.to(job.device, kind)
    own = replace(problem, network=network, target=cast, settings=problem.settings.replace({"betas": (_BETA, 0.9)}))
    first = synthesize(own, State(images), job, until=1)
    whole = first if until == 1 else synthesize(own, State(images), job)
    if first.first is None:
        raise RuntimeError("the engine returned no gradient")
    return torch.tensor(whole.curve["total"], dtype=torch.float64), first.first / (1 - _BETA)


def _distance_from_differences(gradient: Tensor) -> float:
    """Return the relative difference of the float64 gradient from central differences, in random directions.

    For a direction d of independent normal numbers, the mean of ⟨error, d⟩² is ‖error‖².
    """
    source, squares = generator("selftest", "directions"), []
    images, problem, job = _images().double(), _problem(), _plain()
    for _ in range(_DIRECTIONS):
        direction = torch.randn(images.shape, generator=source, dtype=torch.float64)
        ahead, behind = (
            float(_trajectory(problem, images + sign * _STEP * direction, job, until=1)[0][0]) for sign in (1, -1)
        )
        squares.append(((ahead - behind) / (2 * _STEP) - float((gradient * direction).sum())) ** 2)
    return float((sum(squares) / len(squares)) ** 0.5 / gradient.norm())
