"""One group of classes: prepared by the method, then optimized."""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wmdd.config.schema import Config
from wmdd.data.pixels import pixel_range, quantize
from wmdd.distill.barycenter.processes import Pending, Submit, deferred
from wmdd.distill.checkpoints import identity, read_checkpoint, write_checkpoint
from wmdd.distill.methods import base
from wmdd.distill.statistics import Decode, StatisticsByClass
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Target
from wmdd.errors import WmddError
from wmdd.networks.checkpoint import Clock, StopCheck
from wmdd.runs.class_partition import Group
from wmdd.runs.distilled_set import counted_weights
from wmdd.runs.folder import RunFolder
from wmdd.runtime.memory import within_memory
from wmdd.runtime.meter import Meter
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.seeding import seed_of
from wmdd.runtime.team import SINGLE, Team
from wmdd.session import Session
from wmdd.storage.files import write_tensors

logger = logging.getLogger(__name__)


def barycenter_seed(config: Config, name: str) -> int:
    """Return the seed of a class's barycenter."""
    return seed_of(config.seed, "barycenter", name)


def submitted(
    session: Session, method: base.Method, group: Group, found: StatisticsByClass, submit: Submit
) -> dict[int, Pending]:
    """Submit the barycenters of a group's classes; returns none for a method without barycenters."""
    config, settings = session.config, method.barycenter()
    if settings is None:
        return {}
    seeds = {index: barycenter_seed(config, session.dataset.classes[index]) for index in group.classes}
    return {index: submit(found[index].features, config.ipc, settings, seed) for index, seed in seeds.items()}


@dataclass(frozen=True)
class Prepared:
    """A group before synthesis: its start images and what they are optimized for."""

    names: list[str]
    """Names of its classes"""
    images: Tensor
    """[G·k, channels, H, W] float32, normalized; k is K, or less in spread groups"""
    labels: Tensor
    """[G·k] int64"""
    weights: Tensor
    """[G, k] float32, the weights of these images within their class"""
    w2: dict[str, float]
    """Squared Wasserstein-2 distance of each class's barycenter; empty without barycenters"""
    problem: Problem | None
    """None for methods that optimize nothing"""
    statistics_seconds: float = 0.0
    """Seconds of the pass over the images of its classes"""


def prepare(
    session: Session,
    method: base.Method,
    group: Group,
    found: StatisticsByClass,
    pending: Mapping[int, Pending] | None = None,
    decode: Decode | None = None,
) -> Prepared:
    """Let the method plan each class of a group, and join the plans.

    Args:
        session: session of the run.
        method: method of the run.
        group: group to prepare.
        found: statistics of the classes.
        pending: barycenters of the classes, by class index; None computes them here.
        decode: decodes batches of the training images; None decodes them in this process.
    """
    config, dataset = session.config, session.dataset
    names = [dataset.classes[index] for index in group.classes]
    observe = functools.partial(session.teacher.observe, ranks=session.ranks, batch_size=config.statistics.batch_size)
    pending = submitted(session, method, group, found, deferred) if pending is None else pending
    atoms = {index: solved() for index, solved in pending.items()}
    plans = {}
    for index, name in zip(group.classes, names, strict=True):
        own = found.get(index), observe, atoms.get(index), decode
        plans[index] = method.prepare(base.ClassData(index, name, config, dataset, *own))
    even = torch.full((config.ipc,), 1 / config.ipc)
    weights = torch.stack([even if plan.weights is None else plan.weights for plan in plans.values()])
    labels = torch.cat(
        [torch.full((config.ipc,), index) if plan.labels is None else plan.labels for index, plan in plans.items()]
    )
    start = torch.cat([plan.images for plan in plans.values()])
    low, high = group.images or (0, config.ipc)

    def rows(values: Tensor) -> Tensor:
        """Return the rows [G·K, ...] of the images of this group."""
        return values.unflatten(0, (len(plans), config.ipc))[:, low:high].flatten(0, 1)

    problem = None
    if objective := method.objective():
        settings = method.synthesis()
        power = config.barycenter.weight_power
        counted = counted_weights(weights, power) if settings.bn_weighted else even.expand_as(weights)
        mean, variance = _moments(session, method, group.classes, found, counted)
        targets = [plan.atoms for plan in plans.values() if plan.atoms is not None]
        joined = torch.stack(targets)[:, low:high] if len(targets) == len(plans) else None
        # By its classes, and by its images where these are a part of each class: no cut into blocks changes either.
        part = () if group.images is None else ("images", low)
        problem = Problem(
            session.teacher.network,
            objective,
            Target(rows(labels), counted[:, low:high], mean, variance, joined),
            settings,
            pixel_range(config.data),
            (config.seed, "group", *names, *part),
            rows(start) if settings.injections else None,
        )
    w2 = {name: plan.w2 for name, plan in zip(names, plans.values(), strict=True) if plan.w2 is not None}
    seconds = sum(one.seconds for one in found.values())
    return Prepared(names, rows(start), rows(labels), weights[:, low:high], w2, problem, seconds)


def _moments(
    session: Session, method: base.Method, classes: Sequence[int], found: StatisticsByClass, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the target BatchNorm means and variances: per class [G, M], or the teacher's running moments [1, M].

    With ``bn_class_share``, the running moments are blended with the mean of the class moments (EDC, Shao et al. 2024).
    """
    objective, settings = method.objective(), method.synthesis()
    if objective is None or not objective.per_class:
        mean, variance = (values[None].cpu() for values in session.teacher.network.running_moments())
        if share := settings.bn_class_share:
            mean = mean.lerp(torch.stack([found[index].mean for index in classes]).mean(0), share)
            variance = variance.lerp(torch.stack([found[index].within for index in classes]).mean(0), share)
        return mean, variance
    matched = settings.bn_variance == "matched"
    variances = [found[index].variance(weights, matched) for index, weights in zip(classes, counted, strict=True)]
    return torch.stack([found[index].mean for index in classes]), torch.stack(variances)


def optimize(
    prepared: Prepared,
    state: State,
    ranks: Ranks,
    team: Team = SINGLE,
    advance: Callable[[int], None] = lambda iterations: None,
    save: Callable[[State], None] = lambda state: None,
    check: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    until: int | None = None,
) -> State:
    """Synthesize a prepared group from a state (``engine.synthesize``).

    A method without an objective leaves the state unchanged.

    Raises:
        WmddError: the device has too little memory. The message names the key to change.
        Interrupted: a stop was requested. The state was saved.
    """
    if prepared.problem is None:
        return state
    fewer = f"set synthesis.classes_per_group below {len(prepared.names)}"
    shared = "share each class among ranks with synthesis.split_class"
    with within_memory(ranks.device, fewer if len(prepared.names) > 1 else shared):
        return synthesize(prepared.problem, state, ranks, team, advance, save, check, until)


def distill_group(
    session: Session,
    folder: RunFolder,
    team: Team,
    group: Group,
    prepared: Prepared,
    meter: Meter,
    advance: Callable[[int], None],
) -> None:
    """Synthesize a prepared group, with checkpoints, and write its file.  ``meter`` has measured the preparation."""
    config, ranks = session.config, session.ranks
    clock = Clock(config.compute.checkpoint_seconds)

    def save(state: State) -> None:
        if team.rank == 0:
            write_checkpoint(session, folder, group, state, meter.read())
        clock.restart()

    state, spent = read_checkpoint(session, folder, group)
    if not team.alike(state.iteration if state else -1):
        path = folder.checkpoint_file(group.index)
        raise WmddError(f"{path}: not every rank sees the same checkpoint; start the same command again")
    meter.add_previous(spent)
    if state:
        logger.info(f"group {group.index}: resumes at iteration {state.iteration}")
    state = state or State(prepared.images)
    advance(state.iteration)
    final = optimize(prepared, state, ranks, team, advance, save, StopCheck(team, session.stop, clock.due))
    if team.rank:
        return
    measured = {"statistics_seconds": round(prepared.statistics_seconds, 3)}
    meta = {"classes": prepared.names, **measured, **meter.read(), "curve": final.curve, "w2": prepared.w2}
    tensors = {
        "images": quantize(final.images, config.data),
        "labels": prepared.labels,
        "weights": prepared.weights.flatten(),
    }
    folder.bind_arithmetic(ranks.arithmetic)
    write_tensors(folder.group_file(group.index), tensors, {"group": json.dumps(meta)} | identity(session))
    folder.checkpoint_file(group.index).unlink(missing_ok=True)
