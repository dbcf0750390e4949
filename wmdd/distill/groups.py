"""One group of classes: prepared by the method, then optimized."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wmdd.config.schema import Config
from wmdd.data.pixels import pixel_range, quantize
from wmdd.distill.barycenter.pool import Pending, Submit, deferred
from wmdd.distill.checkpoints import identity, read_checkpoint, write_checkpoint
from wmdd.distill.job import Job, StatisticsByClass
from wmdd.distill.methods import base
from wmdd.distill.synthesis.engine import State, synthesize
from wmdd.distill.synthesis.objective import Target
from wmdd.errors import WmddError
from wmdd.networks.checkpoint import Clock
from wmdd.runs.partition import Group
from wmdd.runtime.memory import within_memory
from wmdd.runtime.meter import Meter
from wmdd.runtime.seeding import seed_of
from wmdd.runtime.team import SINGLE, Team
from wmdd.storage.files import write_tensors

logger = logging.getLogger(__name__)


def barycenter_seed(config: Config, name: str) -> int:
    """Return the seed of a class's barycenter."""
    return seed_of(config.seed, "barycenter", name)


def submitted(
    job: Job, method: base.Method, group: Group, found: StatisticsByClass, submit: Submit
) -> dict[int, Pending]:
    """Ask for the barycenters of a group's classes, if the method wants any."""
    settings = method.barycenter()
    if settings is None:
        return {}
    seeds = {index: barycenter_seed(job.config, job.dataset.classes[index]) for index in group.classes}
    return {index: submit(found[index].features, job.config.ipc, settings, seed) for index, seed in seeds.items()}


@dataclass(frozen=True)
class Prepared:
    """A group before synthesis: where its images start and what they are matched to."""

    group: Group
    names: list[str]
    """Of its classes"""
    images: Tensor
    """[G·K, channels, H, W] float32, normalised"""
    labels: Tensor
    """[G·K] int64"""
    weights: Tensor
    """[G, K] float32, each row sums to one"""
    w2: dict[str, float]
    """Squared Wasserstein-2 distance of each class's barycenter, where there is one"""
    target: Target | None
    """None for methods that optimise nothing"""

    @property
    def seed(self) -> tuple[object, ...]:
        """Names the group for ``seed_of``: by its classes, which no cut into blocks changes."""
        return ("group", *self.names)


def prepare(
    job: Job, method: base.Method, group: Group, found: StatisticsByClass, pending: Mapping[int, Pending] | None = None
) -> Prepared:
    """Let the method plan each class of a group, and put the plans together.

    Args:
        job: of the run.
        method: who plans.
        group: the classes.
        found: their statistics.
        pending: their barycenters, by index; None computes here what the method asks for.
    """
    config, count, settings = job.config, job.config.ipc, method.synthesis()
    names = [job.dataset.classes[index] for index in group.classes]
    observe = functools.partial(job.teacher.observe, ranks=job.ranks, batch_size=config.statistics.batch_size)
    pending = submitted(job, method, group, found, deferred) if pending is None else pending
    atoms = {index: solved() for index, solved in pending.items()}
    plans = [
        method.prepare(base.ClassData(index, name, config, job.dataset, found.get(index), observe, atoms.get(index)))
        for index, name in zip(group.classes, names, strict=True)
    ]
    own = zip(group.classes, plans, strict=True)
    labels = torch.cat([torch.full((count,), index) if plan.labels is None else plan.labels for index, plan in own])
    even = torch.full((count,), 1 / count)
    weights = torch.stack([even if plan.weights is None else plan.weights for plan in plans])
    objective = method.objective()
    target = None
    if objective is not None:
        counted = weights if settings.bn_weighted else even.expand_as(weights)
        if objective.per_class:
            matched = settings.bn_variance == "matched"
            own_stats = [found[index] for index in group.classes]
            mean = torch.stack([one.mean for one in own_stats])
            pairs = zip(own_stats, counted, strict=True)
            variance = torch.stack([one.variance(share, matched) for one, share in pairs])
        else:
            mean, variance = (moment[None].cpu() for moment in job.teacher.network.running_moments())
        targets = [plan.atoms for plan in plans if plan.atoms is not None]
        target = Target(labels, counted, mean, variance, torch.stack(targets) if len(targets) == len(plans) else None)
    w2 = {name: plan.w2 for name, plan in zip(names, plans, strict=True) if plan.w2 is not None}
    return Prepared(group, names, torch.cat([plan.images for plan in plans]), labels, weights, w2, target)


def optimize(
    job: Job,
    method: base.Method,
    prepared: Prepared,
    state: State | None = None,
    team: Team = SINGLE,
    advance: Callable[[int], None] = lambda iterations: None,
    save: Callable[[State], None] | None = None,
    due: Callable[[], bool] = lambda: False,
) -> State:
    """Synthesise a prepared group, from its start or from a state; a selection is done as it is."""
    config = job.config
    objective = method.objective()
    state = state or State(prepared.images)
    if objective is None or prepared.target is None:
        return state
    limits, seed = pixel_range(config.data), (config.seed, *prepared.seed)
    fewer = f"set synthesis.classes_per_group below {len(prepared.names)}"
    shared = "share each class among ranks with synthesis.split_class"
    with within_memory(job.ranks.device, fewer if len(prepared.names) > 1 else shared):
        return synthesize(
            job.teacher.network,
            state,
            prepared.target,
            objective,
            method.synthesis(),
            limits,
            seed,
            job.ranks,
            team,
            advance,
            save,
            due,
            job.stop,
        )


def distill_group(
    job: Job,
    method: base.Method,
    team: Team,
    group: Group,
    found: StatisticsByClass,
    pending: Mapping[int, Pending],
    advance: Callable[[int], None],
) -> None:
    """Synthesise a group, with checkpoints, and write its file."""
    meter = Meter(job.ranks.device, team.size)
    prepared = prepare(job, method, group, found, pending)
    clock = Clock(job.config.compute.checkpoint_seconds)

    def save(state: State) -> None:
        if team.rank == 0:
            write_checkpoint(job, group, state, meter.read())
        clock.restart()

    state, spent = read_checkpoint(job, group)
    if not team.alike(state.iteration if state else -1):
        path = job.folder.checkpoint_file(group.index)
        raise WmddError(f"{path}: not every rank sees the same checkpoint; start the same command again")
    meter.add_previous(spent)
    if state:
        logger.info(f"group {group.index}: goes on at iteration {state.iteration}")
    advance(state.iteration if state else 0)
    final = optimize(job, method, prepared, state, team, advance, save, clock.due)
    if team.rank:
        return
    measured = {"statistics_seconds": round(sum(one.seconds for one in found.values()), 3)}
    meta = {"classes": prepared.names, **measured, **meter.read(), "curve": final.curve, "w2": prepared.w2}
    tensors = {
        "images": quantize(final.images, job.config.data),
        "labels": prepared.labels,
        "weights": prepared.weights.flatten(),
    }
    job.folder.bind_arithmetic(job.ranks.arithmetic)
    write_tensors(job.folder.group_file(group.index), tensors, {"group": json.dumps(meta)} | identity(job))
    job.folder.checkpoint_file(group.index).unlink(missing_ok=True)
