"""The synthesis of one group: the engine, the plain reference, and the difference of their first gradients."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import reference
from bench.timing import Run, Stopwatch, flops
from bench.workloads import OWN, BenchSession, Checks, Workload, difference
from wmdd.distill import groups
from wmdd.distill.methods import registry
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Objective, Target
from wmdd.errors import InputError, WmddError


def first_group(bench: BenchSession) -> tuple[groups.Prepared, Problem]:
    """Return the first group of the run, prepared, and its problem.

    Raises:
        InputError: the method optimizes no images.
    """
    prepared = groups.prepare(bench, registry.create(bench.config), bench.groups[0], bench.measured)
    if prepared.problem is None:
        raise InputError(f"method = {bench.config.method!r} optimizes no images: there is no synthesis to time")
    return prepared, prepared.problem


def synthesis_of(bench: BenchSession, with_reference: bool) -> Workload:
    """Return the workload of iterations of the first group."""
    config, job = bench.config, bench.ranks
    prepared, problem = first_group(bench)
    objective, settings, target, limits = problem.objective, problem.settings, problem.target, problem.limits
    count = len(prepared.images)

    def engine(
        chosen: Any, images: Tensor, iterations: int, advance: Callable[[int], None] = lambda iterations: None
    ) -> State:
        asked = replace(problem, settings=chosen.replace({"iterations": iterations}))
        return synthesize(asked, State(images), job, advance=advance)

    def own(steps: int, watch: Stopwatch) -> None:
        engine(settings, prepared.images, steps, watch)

    def model_flops() -> float:
        images = prepared.images.to(job.device, copy=True).requires_grad_(True)
        with job.autocast():
            return flops(lambda: bench.teacher.network.predict(images).sum().backward())

    contestants: dict[str, Run] = {OWN: own}
    check: Callable[[], Checks] = dict
    if with_reference:
        probe = reference.Probe(bench.classifier)
        loss_of = reference_loss(objective, target.weights)
        plain_targets = reference_targets(target, probe, job.device)
        views = reference.Views(settings.crop_scale, settings.flip, settings.jitter, settings.augment == "image")
        edges = (limits[0].to(job.device), limits[1].to(job.device)) if settings.clamp else None

        def plain_loss(pixels: Tensor) -> Tensor:
            return loss_of(probe, pixels, plain_targets)

        def plainly(steps: int, watch: Stopwatch) -> None:
            start = prepared.images.to(job.device)
            lr, betas = settings.lr, settings.betas
            reference.synthesize(start, plain_loss, views, steps, lr, betas, edges, watch)

        def check() -> Checks:
            return {
                OWN: start_differences(engine, settings, prepared.images, probe, plain_targets, loss_of, job.device)
            }

        contestants["reference"] = plainly
    return Workload(
        stage="synthesis",
        unit="img·iter/s",
        contestants=contestants,
        work=lambda steps: steps * count,
        most=10**9,
        warm=1,
        device=job.device,
        check=check,
        setup={"batch": count, "classes": len(bench.groups[0].classes), "ipc": config.ipc, "method": config.method},
        network=config.teacher.network,
        step_flops=model_flops,
    )


def start_differences(
    engine: Callable[[Any, Tensor, int], State],
    settings: Any,
    images: Tensor,
    probe: reference.Probe,
    targets: list[reference.ClassTarget],
    loss_of: reference.LossOf,
    device: torch.device,
) -> dict[str, float]:
    """Return the relative differences of the engine's loss and image gradient from the reference's, at ``images``.

    Both get whole images. The engine takes one step, so that Adam's first moment is (1 − β1) times its gradient.
    ``gradient_rounding`` shows the effect of rounding alone: the difference of the reference's gradient from its own in
    float64. A single ReLU input within rounding of zero makes both differences large.
    """
    whole = settings.replace(
        {"crop_scale": (1.0, 1.0), "flip": False, "jitter": 0, "crop_curriculum": 0.0, "betas": (0.5, 0.9)}
    )
    state = engine(whole, images, 1)
    loss, gradient = _plain_gradient(loss_of, probe, images.to(device), targets)
    exact = [one.double() for one in targets]
    probe.network.double()
    _, exactly = _plain_gradient(loss_of, probe, images.to(device).double(), exact)
    probe.network.float()  # exact, because the weights were fp32 before
    if state.first is None:
        raise WmddError("the engine returned no gradient")
    own = torch.tensor(state.curve["total"][0])
    return {
        "loss_difference": difference(own, loss),
        "gradient_difference": difference(2 * state.first, gradient),
        "gradient_rounding": difference(gradient, exactly),
    }


def _plain_gradient(
    loss_of: reference.LossOf, probe: reference.Probe, images: Tensor, targets: list[reference.ClassTarget]
) -> tuple[Tensor, Tensor]:
    """Return the plain loss and its gradient with respect to the images."""
    pixels = images.clone().requires_grad_(True)
    loss = loss_of(probe, pixels, targets)
    (gradient,) = torch.autograd.grad(loss, pixels)
    return loss, gradient


def reference_loss(objective: Objective, weights: Tensor) -> reference.LossOf:
    """Return the plain loss for an objective.

    Raises:
        InputError: the reference does not support the objective.
    """
    common = objective.per_class and objective.feature == 1 and objective.bn_first == 1
    if common and objective.squared and not objective.ce:
        return partial(reference.paper_loss, bn_weight=objective.bn)
    if common and not objective.squared and torch.allclose(weights, weights[0, 0]):
        return partial(reference.upstream_loss, bn_weight=objective.bn, ce_weight=objective.ce)
    raise InputError(
        "the plain reference supports only the objectives of the paper and of its public code (config variants +paper"
        " and +upstream): time this objective with --no-reference"
    )


def reference_targets(target: Target, probe: reference.Probe, device: torch.device) -> list[reference.ClassTarget]:
    """Return the engine's target in the reference's form: class by class, layer by layer."""
    norms = [layer for layer in probe.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    sizes = [layer.num_features for layer in norms]
    target = target.to(device)
    if target.atoms is None:
        raise InputError("the plain reference needs barycenter atoms: time this method with --no-reference")
    owners = target.labels.view(target.weights.shape)[:, 0].tolist()
    return [
        reference.ClassTarget(
            label,
            target.atoms[row],
            target.weights[row],
            list(target.mean[row].split(sizes)),
            list(target.variance[row].split(sizes)),
        )
        for row, label in enumerate(owners)
    ]
