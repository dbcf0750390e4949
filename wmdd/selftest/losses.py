"""Losses and gradients of the synthesis on the device, compared with float64 on the CPU."""

from collections.abc import Mapping
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
from wmdd.runtime.team import SINGLE, Team
from wmdd.selftest.rows import Precision, RowResult, Workplace, result, section


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
"""Tolerances of each precision.  They separate fp32 from TF32 (11 bits), and TF32 from bf16 (8 bits)."""
FINITE_DIFFERENCE_TOLERANCE = 1e-4
"""Largest relative difference of the float64 gradient from finite differences of the float64 loss."""

_CLASSES, _COUNT, _PIXELS, _ITERATIONS, _STEP, _DIRECTIONS = 2, 4, 16, 20, 1e-6, 6
_BETA = 0.5


@dataclass(frozen=True)
class Trajectory:
    """What a synthesis computed."""

    losses: Tensor
    """[iterations] float64"""
    gradient: Tensor
    """Of the images at the first iteration: [N, channels, H, W], on the CPU"""

    def gaps(self, exact: "Trajectory") -> dict[str, float]:
        """Return the relative differences of ``loss`` and ``gradient`` from another one (``Tolerance``)."""
        return {
            "loss": float((self.losses - exact.losses).abs().max() / exact.losses[0]),
            "gradient": float((self.gradient.double() - exact.gradient).norm() / exact.gradient.norm()),
        }


def within(gaps: Mapping[str, float], allowed: Tolerance) -> bool:
    """Return whether both differences are allowed; NaN is not."""
    return gaps["loss"] <= allowed.loss and gaps["gradient"] <= allowed.gradient


def told(gaps: Mapping[str, float], allowed: Tolerance) -> str:
    """Return both differences and what is allowed, as text."""
    return ", ".join(f"{name} {gaps[name]:.0e} (at most {most:.0e})" for name, most in vars(allowed).items())


def compare(place: Workplace, precision: Precision, compiled: bool = False) -> RowResult:
    """Compare the losses of one trajectory and the first gradient on the device with float64 on the CPU.

    The float64 gradient itself is compared with finite differences of the loss, which use no backward pass.
    """
    exact = place.once("float64", exact_trajectory)
    by_differences = place.once("differences", lambda: _distance_from_differences(exact.gradient))
    with ranks(section(place, precision, compiled)) as job:
        gaps = _trajectory(_problem(_COUNT), _images(_COUNT), job).gaps(exact)
    allowed = TOLERANCES[precision]
    return result(
        within(gaps, allowed) and by_differences <= FINITE_DIFFERENCE_TOLERANCE,
        f"from float64: {told(gaps, allowed)}; float64 from finite differences: {by_differences:.0e} (at most"
        f" {FINITE_DIFFERENCE_TOLERANCE:.0e})",
        **gaps,
        finite_differences=by_differences,
    )


def exact_trajectory(count: int = _COUNT) -> Trajectory:
    """Return the trajectory in float64 on the CPU, with ``count`` images in each class."""
    return _trajectory(_problem(count), _images(count).double(), _plain())


def split_gaps(job: Ranks) -> dict[str, float]:
    """Return the differences from float64 when all ranks of a job share each class; every rank must call it."""
    team = job.team(job.size, "synthesis.split_class")
    return _trajectory(_problem(job.size), _images(job.size), job, team).gaps(exact_trajectory(job.size))


def _problem(count: int) -> Problem:
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
        labels=torch.arange(_CLASSES).repeat_interleave(count),
        weights=torch.full((_CLASSES, count), 1 / count),
        mean=torch.randn(_CLASSES, size, generator=source) * 0.3,
        variance=torch.rand(_CLASSES, size, generator=source) + 0.5,
        atoms=torch.rand(_CLASSES, count, frozen.feature_size, generator=source),
    )
    settings = SynthesisConfig(iterations=_ITERATIONS, lr=0.05, augment="image", crop_scale=(0.5, 1.0), jitter=2)
    limits = torch.full((3, 1, 1), -3.0), torch.full((3, 1, 1), 3.0)
    return Problem(frozen, Objective(1.0, 10.0, 1.0), target, settings, limits, ("selftest",))


def _images(count: int) -> Tensor:
    return torch.randn(_CLASSES * count, 3, _PIXELS, _PIXELS, generator=generator("selftest", "images"))


def _plain() -> Ranks:
    """Return a single rank on the CPU, whatever the machine has."""
    return Ranks(0, 1, torch.device("cpu"), Arithmetic("cpu", "fp32", False, True, 1))


def _trajectory(
    problem: Problem, images: Tensor, job: Ranks, team: Team = SINGLE, until: int | None = None
) -> Trajectory:
    """Return the losses and the first gradient of a synthesis; ``until=1`` computes only the first iteration.

    The arithmetic follows from the type of ``images``.  Adam's first moment after one step is (1 − β1) times the
    gradient.
    """
    kind = images.dtype
    target = problem.target
    atoms = None if target.atoms is None else target.atoms.to(kind)
    cast = Target(target.labels, target.weights.to(kind), target.mean.to(kind), target.variance.to(kind), atoms)
    network = problem.network.to(job.device, kind)
    own = replace(problem, network=network, target=cast, settings=problem.settings.replace({"betas": (_BETA, 0.9)}))
    first = synthesize(own, State(images), job, team, until=1)
    whole = first if until == 1 else synthesize(own, State(images), job, team)
    if first.first is None:
        raise RuntimeError("the engine returned no gradient")
    return Trajectory(torch.tensor(whole.curve["total"], dtype=torch.float64), first.first / (1 - _BETA))


def _distance_from_differences(gradient: Tensor) -> float:
    """Return the relative difference of the float64 gradient from central differences, in random directions.

    For a direction d of independent normal numbers, the mean of ⟨error, d⟩² is ‖error‖².
    """
    source, squares = generator("selftest", "directions"), []
    images, problem, job = _images(_COUNT).double(), _problem(_COUNT), _plain()
    for _ in range(_DIRECTIONS):
        direction = torch.randn(images.shape, generator=source, dtype=torch.float64)
        ahead, behind = (
            float(_trajectory(problem, images + sign * _STEP * direction, job, until=1).losses[0]) for sign in (1, -1)
        )
        squares.append(((ahead - behind) / (2 * _STEP) - float((gradient * direction).sum())) ** 2)
    return float((sum(squares) / len(squares)) ** 0.5 / gradient.norm())
