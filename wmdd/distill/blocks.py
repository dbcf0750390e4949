"""Blocks: find the missing ones, distill their groups, assemble their files."""

import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wmdd.config.schema import Config
from wmdd.data.batch_sources import GB
from wmdd.data.dataset import Dataset, ImageSet
from wmdd.distill import statistics
from wmdd.distill.barycenter.processes import Pending, solvers
from wmdd.distill.checkpoints import finished_group
from wmdd.distill.groups import distill_group, prepare, submitted
from wmdd.distill.methods import base, registry
from wmdd.errors import InputError, WmddError
from wmdd.records.provenance import provenance
from wmdd.runs.class_partition import Block, Group, is_spread
from wmdd.runs.folder import RunFolder
from wmdd.runs.work_queue import WorkQueue
from wmdd.runtime import cpus
from wmdd.runtime.memory import within_memory
from wmdd.runtime.meter import Meter
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.team import Team
from wmdd.session import Session
from wmdd.storage.files import FORMAT, expect, map_tensors, write_json, write_tensors

logger = logging.getLogger(__name__)

StatisticsInOrder = Iterator[tuple[int, statistics.ClassStatistics]]
Measured = tuple[Group, statistics.StatisticsByClass, dict[int, Pending]]
"""A group with the statistics and the submitted barycenters of its classes"""


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

    The groups of all missing blocks form one queue. During the synthesis of a group, the barycenters of the next one
    are computed, and the images of the one after it are decoded. Memory thus holds the statistics of two groups at
    most. A block is assembled when its last group is done.

    Raises:
        InputError: a complete block was made with another teacher, or the method cannot use the dataset.
        Interrupted: a stop was requested. Finished groups and checkpoints are kept.
    """
    config, ranks = session.config, session.ranks
    method = check(config, session.dataset)
    team = ranks.team(config.synthesis.split_class, "synthesis.split_class")
    # Rank 0 decides for all: machines may see a change in a shared folder at different times.
    wanted = ranks.broadcast_from_main(
        [block.index for block in blocks if _must_write(session, folder, block)] if ranks.main else []
    )
    if not wanted:
        return
    chosen = set(wanted)
    made = [block for block in blocks if block.index in chosen]
    owners = {group.index: block for block in made for group in block.groups}
    groups = [group for block in made for group in block.groups]
    missing = set(
        ranks.broadcast_from_main(
            [group.index for group in groups if finished_group(session, folder, group) is None] if ranks.main else []
        )
    )
    todo = [group for group in groups if group.index in missing]

    def is_done(group: Group) -> bool:
        return folder.sidecar(owners[group.index].index) is not None or bool(finished_group(session, folder, group))

    def lock_file(group: Group) -> Path:
        return folder.lock_file(f"group-{group.index:05d}")

    queue = WorkQueue(f"groups of {folder.path}", ranks, team, todo, lock_file, is_done, session.stop)
    try:
        for position, group in _distilled(session, folder, method, team, queue, todo):
            queue.release(position)
            block = owners[group.index]
            # The last groups first: while one of them is missing, no other file is read.
            if team.rank == 0 and all(finished_group(session, folder, each) for each in reversed(block.groups)):
                _assemble_once(session, folder, method, block)
    finally:
        queue.close()
    ranks.barrier()
    if ranks.main:
        for block in made:
            _assemble_once(session, folder, method, block)
    ranks.barrier()


def _must_write(session: Session, folder: RunFolder, block: Block) -> bool:
    """Return whether a block is missing or damaged.

    Raises:
        InputError: the block is complete, but was made with another teacher.
    """
    sidecar = folder.sidecar(block.index)
    reason = folder.damaged(block.index)
    if reason:
        logger.warning(f"{reason}: the block is distilled again")
        with folder.locked(f"block-{block.index:05d}", session.stop):
            if folder.damaged(block.index):  # unless another process has repaired it
                folder.sidecar_file(block.index).unlink(missing_ok=True)
    if reason or sidecar is None:
        folder.check_arithmetic(session.ranks.arithmetic)
        return True
    if sidecar["teacher"] != session.teacher.sha256:
        raise InputError(
            f"{folder.block_file(block.index)}: was made with the teacher {sidecar['teacher'][:12]}, the cache now"
            f" holds {session.teacher.sha256[:12]}; restore the first teacher (WMDD_CACHE), or use another --out"
        )
    return False


def _distilled(
    session: Session, folder: RunFolder, method: base.Method, team: Team, queue: WorkQueue[Group], todo: Sequence[Group]
) -> Iterator[tuple[int, Group]]:
    """Distill the groups that the queue hands out; yield each, with its position, when its file is written.

    Args:
        session: session of the run.
        folder: run folder.
        method: method of the run.
        team: this rank's team.
        queue: queue of missing groups.
        todo: all missing groups, for the progress bars.
    """
    config, ranks = session.config, session.ranks
    train = session.dataset.train
    classes = [index for group in todo for index in group.classes] if method.uses_statistics else []
    images = sum(len(train.of_class(index)) for index in classes)
    steps = method.synthesis().iterations * len(todo) if method.objective() else 0
    with (
        progress("statistics", -(-images // team.count), "images", timed=False) as measured,
        progress(config.method, -(-steps // team.count), "iterations") as optimized,
        solvers(config.compute.workers, session.stop) as submit,
        train.decoders(config.compute.workers, _batches_ahead(config, train, todo)) as decode,
    ):

        def begun(group: Group) -> tuple[Group, StatisticsInOrder]:
            """Start the decoders on the images of a group. Each rank of a team measures its part of the classes."""
            own = group.classes if method.uses_statistics else ()
            return group, statistics.measure(session, own[team.rank :: team.size], measured, decode)

        def measured_group(begun: tuple[Group, StatisticsInOrder]) -> Measured:
            group, own = begun
            with within_memory(ranks.device, "lower statistics.batch_size"):
                found = team.together(lambda: dict(own))
                if team.size > 1 and method.uses_statistics:  # the other ranks have written theirs to the cache
                    found = team.together(lambda: dict(statistics.measure(session, group.classes, decode=decode)))
            return group, found, submitted(session, method, group, found, submit)

        def synthesized(ready: Measured) -> None:
            group, found, pending = ready
            meter = Meter(ranks.device, team.size)
            prepared = prepare(session, method, group, found, pending, decode)
            queue.begin_ahead()  # only now: the decoders work in the order of the requests
            distill_group(session, folder, team, group, prepared, meter, optimized)

        for position in queue.worked(measured_group, synthesized, begun):
            yield position, todo[position]


_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - torch puts the results of decoders there


def _batches_ahead(config: Config, train: ImageSet, todo: Sequence[Group]) -> int:
    """Return how many batches each decoder computes ahead, so that a group is decoded while another is synthesized.

    The batches lie in shared memory. They take at most half of it, and at most ``data.memory_gb`` on a node.
    """
    processes = cpus.processes(config.compute.workers)
    if not processes or not todo:
        return 2
    size = config.statistics.batch_size
    wanted = max(sum(-(-len(train.of_class(index)) // size) for index in group.classes) for group in todo)
    batch = size * train.nbytes // len(train)
    free = shutil.disk_usage(_SHARED_MEMORY).free if os.path.isdir(_SHARED_MEMORY) else 0
    room = min(config.data.memory_gb * GB, free / 2) / cpus.ranks_on_node(os.environ)
    return max(2, min(-(-wanted // processes), int(room / batch / processes)))


def _assemble_once(session: Session, folder: RunFolder, method: base.Method, block: Block) -> None:
    """Assemble a block, unless another process has done so."""
    with folder.locked(f"block-{block.index:05d}", session.stop):
        if folder.sidecar(block.index) is None:
            _assemble(session, folder, method, block)


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
        parts.append(map_tensors(folder.group_file(group.index)))
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
