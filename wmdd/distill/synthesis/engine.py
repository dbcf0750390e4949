"""The loop that optimizes images."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wmdd.config.schema import SynthesisConfig
from wmdd.data import augment
from wmdd.distill.synthesis.objective import Loss, Objective, Target, evaluate, own_rows
from wmdd.errors import Interrupted
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.seeding import generator
from wmdd.runtime.team import SINGLE, Team


@dataclass
class State:
    """State of the synthesis of a group: all that is needed to resume it."""

    images: Tensor
    """[N, channels, H, W] float32, normalized"""
    iteration: int = 0
    """Number of iterations done"""
    first: Tensor | None = None
    """Adam's first moment, shaped like ``images``; None at the start"""
    second: Tensor | None = None
    """Adam's second moment, shaped like ``images``; None at the start"""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """Values of each loss term at the iterations listed under ``iteration``"""


@dataclass(frozen=True)
class Problem:
    """What the images of one group are optimized for."""

    network: FrozenNetwork
    """The frozen teacher"""
    objective: Objective
    """Weights of the terms"""
    target: Target
    """Labels, atoms and moments to match"""
    settings: SynthesisConfig
    """Iterations, learning rate, augmentation"""
    limits: tuple[Tensor, Tensor]
    """Smallest and largest normalized pixel value, each [channels, 1, 1]"""
    seed: tuple[object, ...]
    """Name of the group for ``seed_of``"""
    start: Tensor | None = None
    """[N, channels, H, W] float32, normalized: the images that are injected; None without injections"""


def synthesize(
    problem: Problem,
    state: State,
    ranks: Ranks,
    team: Team = SINGLE,
    advance: Callable[[int], None] = lambda iterations: None,
    save: Callable[[State], None] = lambda state: None,
    check: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    until: int | None = None,
) -> State:
    """Optimize the images of one group against its target.

    Adam runs on the images with a cosine schedule to zero. Each iteration sees them through a random crop, flip and
    roll. Pixels are clamped to the limits after each step. At an injection the images become a mixture with the start
    images, and Adam begins afresh (FADRM, Cui et al. 2025). All draws follow from the seed and the iteration, so a
    resumed synthesis equals an uninterrupted one.

    Args:
        problem: what the images are optimized for.
        state: where to start; its images are [G·K, channels, H, W].
        ranks: device and precision, and whether steps are compiled.
        team: ranks that share the images of each class; every rank gets the whole state and returns it.
        advance: called with the number of iterations done.
        save: writes a checkpoint; called when ``check`` says so.
        check: returns, before an iteration, whether to stop and whether to write a checkpoint (``StopCheck``). The
            answer must be the same on every rank of the team.
        until: iteration to pause at. None runs all iterations of the settings.

    Returns:
        The state reached, on the CPU.

    Raises:
        Interrupted: ``check`` asked to stop; the state was saved.
    """
    device, settings, target = ranks.device, problem.settings, problem.target
    classes, count = target.weights.shape
    rows = own_rows(classes, count, team)
    target = target.part(team).to(device)
    low, high = (limit.to(device) for limit in problem.limits)
    images = state.images[rows].to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=settings.lr, betas=settings.betas, fused=True)
    injected = injection_iterations(settings)
    start = None if problem.start is None else problem.start[rows].to(device)
    if state.first is not None and state.second is not None:
        begun = max((iteration for iteration in injected if iteration < state.iteration), default=0)
        step = torch.tensor(float(state.iteration - begun), device=device)
        moments = {"exp_avg": state.first[rows].to(device), "exp_avg_sq": state.second[rows].to(device)}
        optimizer.state[images] = {"step": step, **moments}
    draws = _schedule(settings, classes * count, images.shape[-1], problem.seed, rows).to(device)
    network, sizes = problem.network, problem.network.layer_sizes

    def loss_of(pixels: Tensor, boxes: augment.Draws) -> Loss:
        with ranks.autocast():
            seen = network(augment.warp(pixels, boxes))
        return evaluate(problem.objective, seen, target, sizes, team)

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

    end = settings.iterations if until is None else until
    for iteration in range(state.iteration, end):
        stopping, saving = check()
        if stopping or saving:
            save(snapshot(iteration))
        if stopping:
            raise Interrupted(f"checkpointed at iteration {iteration} of {settings.iterations}")
        if iteration in injected and start is not None:
            optimizer.state.pop(images, None)
            with torch.no_grad():
                images.lerp_(start, 1 - settings.injection_keep)
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
    return snapshot(max(state.iteration, end))


def injection_iterations(settings: SynthesisConfig) -> list[int]:
    """Return the iterations before which the start images are injected: equal parts of the synthesis."""
    parts = settings.injections + 1
    return [settings.iterations * part // parts for part in range(1, parts)]


def _schedule(
    settings: SynthesisConfig, count: int, size: int, seed: tuple[object, ...], rows: Tensor | None = None
) -> augment.Draws:
    """Draw all crops, flips and rolls of a synthesis, [iterations, 1 or N], and return those of the given rows."""
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
