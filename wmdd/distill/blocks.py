"""Blocks: find the missing ones, distill their groups, assemble their files."""

import hashlib
import itertools
import logging
from contextlib import nullcontext

import torch
from torch import Tensor

from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset
from wmdd.distill import statistics
from wmdd.distill.barycenter.pool import Pending, solvers
from wmdd.distill.checkpoints import finished_group
from wmdd.distill.groups import distill_group, submitted
from wmdd.distill.methods import base, registry
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.records.provenance import provenance
from wmdd.runs.folder import RunFolder
from wmdd.runs.partition import Block, Group, is_spread
from wmdd.runtime.memory import within_memory
from wmdd.runtime.progress_bars import progress
from wmdd.session import Session
from wmdd.storage.files import FORMAT, expect, read_tensors, write_json, write_tensors

logger = logging.getLogger(__name__)


def check(config: Config, dataset: Dataset) -> base.Method:
    """Check method and dataset, and return the method.

    Raises:
        InputError: the method is unknown, it cannot use this dataset, or a class has fewer images than the IPC.
    """
    method = registry.create(config)
    method.check(dataset)
    objective = method.objective()
    if is_spread(config) and objective is not None and objective.per_class:
        raise InputError(
            f"synthesis.grouping = spread: {config.method} matches the moments of each class, and needs all its images"
            " in one group; use synthesis.grouping=classes"
        )
    for index, name in enumerate(dataset.classes):
        count = len(dataset.train.of_class(index))
        if count < config.ipc:
            raise InputError(f"ipc = {config.ipc}: class {name!r} has {count} training images; use ipc <= {count}")
    return method


def distill(session: Session, folder: RunFolder, blocks: list[Block]) -> None:
    """Write every missing block. Complete blocks are not touched.

    Statistics are measured one group ahead of the synthesis. The barycenters of that next group are computed during
    the synthesis. Memory thus holds the statistics of two groups at most.

    Raises:
        Interrupted: a stop was requested. Finished groups and checkpoints are kept.
    """
    method = check(session.config, session.dataset)
    for block in blocks:
        lock = folder.locked(f"block-{block.index:05d}", session.stop) if session.ranks.main else nullcontext()
        with lock:
            # Rank 0 decides for all: machines may see a change in a shared folder at different times.
            if session.ranks.broadcast_from_main(session.ranks.main and _must_write(session, folder, block)):
                _distill_block(session, folder, method, block)


def _must_write(session: Session, folder: RunFolder, block: Block) -> bool:
    """Return whether a block is missing or damaged.

    Raises:
        InputError: the block is complete, but was made with another teacher.
    """
    sidecar = folder.sidecar(block.index)
    reason = folder.damaged(block.index)
    if reason:
        logger.warning(f"{reason}: the block is distilled again")
    if reason or sidecar is None:
        folder.check_arithmetic(session.ranks.arithmetic)
        return True
    if sidecar["teacher"] != session.teacher.sha256:
        raise InputError(
            f"{folder.block_file(block.index)}: was made with the teacher {sidecar['teacher'][:12]}, the cache now"
            f" holds {session.teacher.sha256[:12]}; restore the first teacher (WMDD_CACHE), or use another --out"
        )
    return False


def _distill_block(session: Session, folder: RunFolder, method: base.Method, block: Block) -> None:
    config, ranks = session.config, session.ranks
    team = ranks.team(config.synthesis.split_class, "synthesis.split_class")
    missing = ranks.broadcast_from_main(
        [group.index for group in block.groups if finished_group(session, folder, group) is None]
    )
    todo = [group for group in team.deal(block.groups) if group.index in missing]
    classes = [index for group in todo for index in group.classes] if method.uses_statistics else []
    images = sum(len(session.dataset.train.of_class(index)) for index in classes)
    steps = method.synthesis().iterations * len(todo) if method.objective() else 0
    with (
        progress(f"statistics, block {block.index}", images, "images") as measured,
        progress(f"{config.method}, block {block.index}", steps, "iterations") as optimized,
        solvers(config.compute.workers, session.stop) as submit,
    ):
        # One stream over the whole block: the decoders work ahead while a group is synthesized.
        stream = statistics.measure(session, classes, measured)

        def measure_group(group: Group) -> tuple[Group, statistics.StatisticsByClass, dict[int, Pending]]:
            with within_memory(ranks.device, "lower statistics.batch_size"):
                found = team.together(lambda: dict(itertools.islice(stream, len(group.classes) if classes else 0)))
            return group, found, submitted(session, method, group, found, submit)

        # ``ready`` is released before the next group is measured, so that memory never holds three.
        groups = map(measure_group, todo)
        ready = next(groups, None)
        while ready:
            following = next(groups, None)
            if any(team.anyone(session.stop())):
                raise Interrupted(f"stopped before group {ready[0].index}")
            distill_group(session, folder, method, team, *ready, optimized)
            ready = following
    ranks.barrier()
    if ranks.main:
        _assemble(session, folder, method, block)
    ranks.barrier()


def _assemble(session: Session, folder: RunFolder, method: base.Method, block: Block) -> None:
    """Write the block and then its sidecar, and delete its group files."""
    groups = []
    parts = []
    expect([folder.group_file(group.index) for group in block.groups], session.stop)
    for group in block.groups:
        meta = finished_group(session, folder, group)
        if meta is None:
            raise WmddError(f"{folder.group_file(group.index)}: is missing; run the same command again")
        groups.append(meta)
        parts.append(read_tensors(folder.group_file(group.index)))
    tensors = {name: _by_class(block, [part[name] for part in parts]) for name in ("images", "labels", "weights")}
    names = [session.dataset.classes[index] for index in block.classes]
    sha = write_tensors(folder.block_file(block.index), tensors)
    sidecar = {
        "format": FORMAT,
        "block": block.index,
        "method": session.config.method,
        "seeded": method.seeded,
        "classes": names,
        "class_indices": block.classes,
        "sha256": sha,
        "class_sha256": _class_digests(tensors, names, session.config.ipc),
        "groups": [{key: value for key, value in meta.items() if key != "w2"} for meta in groups],
        "w2": {name: value for meta in groups for name, value in meta["w2"].items()},
        "teacher": session.teacher.sha256,
        "data": session.dataset.fingerprint,
        "fingerprint": session.config.fingerprint("images"),
        "arithmetic": session.ranks.arithmetic.facts,
        "provenance": provenance(session.config.compute, session.ranks.arithmetic),
    }
    write_json(folder.sidecar_file(block.index), sidecar)
    for group in block.groups:
        folder.group_file(group.index).unlink(missing_ok=True)


def _by_class(block: Block, parts: list[torch.Tensor]) -> torch.Tensor:
    """Join the tensors of the groups of a block; the images of a class lie together, however groups cut it."""
    joined = []
    for classes, own in itertools.groupby(zip(block.groups, parts, strict=True), lambda pair: pair[0].classes):
        pieces = [part.unflatten(0, (len(classes), -1)) for _, part in own]
        joined.append(torch.cat(pieces, 1).flatten(0, 1))
    return torch.cat(joined)


def _class_digests(tensors: dict[str, Tensor], names: list[str], count: int) -> dict[str, str]:
    digests = {}
    for position, name in enumerate(names):
        rows = slice(position * count, (position + 1) * count)
        content = hashlib.sha256()
        for key in ("images", "labels", "weights"):
            content.update(tensors[key][rows].contiguous().numpy().tobytes())
        digests[name] = content.hexdigest()
    return digests
