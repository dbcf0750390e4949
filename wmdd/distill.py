"""Distil blocks: statistics, plans and synthesis of each group, then one whole file per block."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wmdd import methods, statistics
from wmdd.barycenter import Pending, Submit, later, solvers
from wmdd.checkpoint import Clock, is_of, marked
from wmdd.config import Config
from wmdd.console import progress, say
from wmdd.cost import Meter
from wmdd.data import Dataset, pixel_range, quantise
from wmdd.distributed import ALONE, Ranks, Team, seed_of, within_memory
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.files import FORMAT, digest, expect, read_metadata, read_tensors, write_json, write_tensors
from wmdd.records import provenance
from wmdd.rundir import Block, Group, RunFolder
from wmdd.synthesis import State, Target, synthesise
from wmdd.teacher import Teacher

Found = Mapping[int, statistics.ClassStatistics]
"""Statistics of each class, by index; empty for methods that use none."""


@dataclass(frozen=True)
class Job:
    """All that distilling needs, for one run folder."""

    config: Config
    dataset: Dataset
    teacher: Teacher
    ranks: Ranks
    folder: RunFolder
    stop: Callable[[], bool]


def check(config: Config, dataset: Dataset) -> methods.Method:
    """Return the method, once nothing speaks against the run.

    Raises:
        InputError: unknown method, what the method itself refuses, or a class with fewer images than it takes.
    """
    method = methods.create(config)
    method.check(dataset)
    for index, name in enumerate(dataset.classes):
        count = len(dataset.train.of_class(index))
        if count < config.ipc:
            raise InputError(f"ipc = {config.ipc}: class {name!r} has {count} training images; use ipc <= {count}")
    return method


def distill(job: Job, blocks: list[Block]) -> None:
    """Write every block that is missing; a block that is whole is left alone.

    Statistics are measured one group ahead of the synthesis, and the barycenters of that group are computed beside it;
    so the statistics of two groups are held, and no more.

    Raises:
        Interrupted: a stop was requested; what was done is kept.
    """
    method = check(job.config, job.dataset)
    for block in blocks:
        lock = job.folder.locked(f"block-{block.index:05d}", job.stop) if job.ranks.main else nullcontext()
        with lock:
            # Rank 0 decides for all: ranks on different machines may see a shared folder at different times.
            if job.ranks.agree(job.ranks.main and _wanted(job, block)):
                _distill_block(job, method, block)


def _wanted(job: Job, block: Block) -> bool:
    """Return whether a block is missing or damaged.

    Raises:
        InputError: it is whole, and was made with another teacher.
    """
    sidecar = job.folder.sidecar(block.index)
    reason = job.folder.damaged(block.index)
    if reason:
        say(f"{reason}: the block is made anew")
    if reason or sidecar is None:
        job.folder.check_arithmetic(job.ranks.arithmetic)
        return True
    if sidecar["teacher"] != job.teacher.sha256:
        raise InputError(
            f"{job.folder.block_file(block.index)}: was made with the teacher {sidecar['teacher'][:12]}, the store now"
            f" holds {job.teacher.sha256[:12]}; bring the first one back (WMDD_CACHE), or use another --out"
        )
    return False


def _distill_block(job: Job, method: methods.Method, block: Block) -> None:
    team = job.ranks.team(job.config.synthesis.split_class, "synthesis.split_class")
    missing = job.ranks.agree([group.index for group in block.groups if _finished(job, group) is None])
    todo = [group for group in team.deal(block.groups) if group.index in missing]
    classes = [index for group in todo for index in group.classes] if method.uses_statistics else []
    images = sum(len(job.dataset.train.of_class(index)) for index in classes)
    steps = method.synthesis().iterations * len(todo) if method.objective() else 0
    with (
        progress(f"statistics, block {block.index}", images, "images") as measured,
        progress(f"{job.config.method}, block {block.index}", steps, "iterations") as optimised,
        solvers(job.config.compute.workers, job.stop) as submit,
    ):
        # One stream over the whole block, read group by group; the decoders work ahead while a group is synthesised.
        stream = statistics.measure(job.config, job.dataset, job.teacher, job.ranks, classes, measured, job.stop)

        def look_at(group: Group) -> tuple[Group, Found, dict[int, Pending]]:
            with within_memory(job.ranks.device, "lower statistics.batch_size"):
                found = team.together(lambda: dict(itertools.islice(stream, len(group.classes) if classes else 0)))
            return group, found, _submitted(job, method, group, found, submit)

        # ``ready`` is dropped before the group after ``following`` is measured: never are three held.
        groups = map(look_at, todo)
        ready = next(groups, None)
        while ready:
            following = next(groups, None)
            if any(team.anyone(job.stop())):
                raise Interrupted(f"stopped before group {ready[0].index}")
            _distill_group(job, method, team, *ready, optimised)
            ready = following
    job.ranks.barrier()
    if job.ranks.main:
        _assemble(job, block)
    job.ranks.barrier()


def barycenter_seed(config: Config, name: str) -> int:
    """Return the seed of a class's barycenter."""
    return seed_of(config.seed, "barycenter", name)


def _submitted(job: Job, method: methods.Method, group: Group, found: Found, submit: Submit) -> dict[int, Pending]:
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
    job: Job, method: methods.Method, group: Group, found: Found, pending: Mapping[int, Pending] | None = None
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
    pending = _submitted(job, method, group, found, later) if pending is None else pending
    atoms = {index: solved() for index, solved in pending.items()}
    plans = [
        method.prepare(methods.ClassData(index, name, config, job.dataset, found.get(index), observe, atoms.get(index)))
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


def optimise(
    job: Job,
    method: methods.Method,
    prepared: Prepared,
    state: State | None = None,
    team: Team = ALONE,
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
        return synthesise(
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


def _distill_group(
    job: Job,
    method: methods.Method,
    team: Team,
    group: Group,
    found: Found,
    pending: Mapping[int, Pending],
    advance: Callable[[int], None],
) -> None:
    """Synthesise a group, with checkpoints, and write its file."""
    meter = Meter(job.ranks.device, team.size)
    prepared = prepare(job, method, group, found, pending)
    clock = Clock(job.config.compute.checkpoint_seconds)

    def save(state: State) -> None:
        if team.rank == 0:
            _write_checkpoint(job, group, state, meter.read())
        clock.restart()

    state, spent = _read_checkpoint(job, group)
    if not team.alike(state.iteration if state else -1):
        path = job.folder.checkpoint_file(group.index)
        raise WmddError(f"{path}: not every rank sees the same checkpoint; start the same command again")
    meter.include(spent)
    if state:
        say(f"group {group.index}: goes on at iteration {state.iteration}")
    advance(state.iteration if state else 0)
    final = optimise(job, method, prepared, state, team, advance, save, clock.due)
    if team.rank:
        return
    measured = {"statistics_seconds": round(sum(one.seconds for one in found.values()), 3)}
    meta = {"classes": prepared.names, **measured, **meter.read(), "curve": final.curve, "w2": prepared.w2}
    tensors = {
        "images": quantise(final.images, job.config.data),
        "labels": prepared.labels,
        "weights": prepared.weights.flatten(),
    }
    job.folder.bind_arithmetic(job.ranks.arithmetic)
    write_tensors(job.folder.group_file(group.index), tensors, {"group": json.dumps(meta)} | _identity(job))
    job.folder.checkpoint_file(group.index).unlink(missing_ok=True)


def _identity(job: Job) -> dict[str, str]:
    """Return what a group and its checkpoint must belong to: config, images and teacher as ``run``; the arithmetic."""
    run = digest([job.config.fingerprint("images"), job.dataset.fingerprint, job.teacher.sha256])
    return {"run": run, "arithmetic": marked(job.ranks.arithmetic)}


def _write_checkpoint(job: Job, group: Group, state: State, spent: Mapping[str, float]) -> None:
    tensors = {"images": state.images}
    if state.first is not None and state.second is not None:
        tensors |= {"first": state.first, "second": state.second}
    reached = {"iteration": str(state.iteration), "curve": json.dumps(state.curve), "spent": json.dumps(spent)}
    meta = reached | _identity(job)
    write_tensors(job.folder.checkpoint_file(group.index), tensors, meta)


def _read_checkpoint(job: Job, group: Group) -> tuple[State | None, dict[str, float]]:
    """Return where the synthesis of a group stands and what it took so far; None and nothing when it begins."""
    path = job.folder.checkpoint_file(group.index)
    meta = read_metadata(path)
    if "run" not in meta or not is_of(job.ranks.arithmetic, meta, f"group {group.index} begins anew"):
        return None, {}
    if meta["run"] != _identity(job)["run"]:
        return None, {}
    tensors, curve = read_tensors(path), json.loads(meta["curve"])
    moments = tensors.get("first"), tensors.get("second")
    return State(tensors["images"], int(meta["iteration"]), *moments, curve), json.loads(meta.get("spent", "{}"))


def _finished(job: Job, group: Group) -> dict[str, Any] | None:
    """Return what is known of a finished group whose block is not yet whole."""
    meta = read_metadata(job.folder.group_file(group.index))
    return json.loads(meta["group"]) if "group" in meta and _identity(job).items() <= meta.items() else None


def _assemble(job: Job, block: Block) -> None:
    """Write the block and then its sidecar, and delete its group files."""
    groups = []
    parts = []
    expect([job.folder.group_file(group.index) for group in block.groups], job.stop)
    for group in block.groups:
        meta = _finished(job, group)
        if meta is None:
            raise WmddError(f"{job.folder.group_file(group.index)}: is missing; run the same command again")
        groups.append(meta)
        parts.append(read_tensors(job.folder.group_file(group.index)))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in ("images", "labels", "weights")}
    names = [job.dataset.classes[index] for index in block.classes]
    sha = write_tensors(job.folder.block_file(block.index), tensors)
    sidecar = {
        "format": FORMAT,
        "block": block.index,
        "method": job.config.method,
        "classes": names,
        "class_indices": block.classes,
        "sha256": sha,
        "class_sha256": _class_digests(tensors, names, job.config.ipc),
        "groups": [{key: value for key, value in meta.items() if key != "w2"} for meta in groups],
        "w2": {name: value for meta in groups for name, value in meta["w2"].items()},
        "teacher": job.teacher.sha256,
        "data": job.dataset.fingerprint,
        "fingerprint": job.config.fingerprint("images"),
        "arithmetic": job.ranks.arithmetic.facts,
        "provenance": provenance(job.config.compute, job.ranks.arithmetic),
    }
    write_json(job.folder.sidecar_file(block.index), sidecar)
    for group in block.groups:
        job.folder.group_file(group.index).unlink(missing_ok=True)


def _class_digests(tensors: dict[str, Tensor], names: list[str], count: int) -> dict[str, str]:
    digests = {}
    for position, name in enumerate(names):
        rows = slice(position * count, (position + 1) * count)
        content = hashlib.sha256()
        for key in ("images", "labels", "weights"):
            content.update(tensors[key][rows].contiguous().numpy().tobytes())
        digests[name] = content.hexdigest()
    return digests
