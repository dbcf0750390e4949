"""The stages of a run, in order; each reads and writes through the run folder, and each goes on where it stopped."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, load_dataset
from wmdd.distill import statistics
from wmdd.distill.blocks import check as check_method
from wmdd.distill.blocks import distill
from wmdd.distill.methods import registry
from wmdd.errors import InputError, Interrupted
from wmdd.runs import partition, progress
from wmdd.runs.baselines import baselines_of
from wmdd.runs.folder import RunFolder
from wmdd.runtime import log
from wmdd.runtime.arithmetic import candidates
from wmdd.runtime.memory import within_memory
from wmdd.runtime.placement import placement_of
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.signals import STOPS, StopRequest, stop_on
from wmdd.session import open_session
from wmdd.storage import cache
from wmdd.storage.files import digest, expect, write_json
from wmdd.students import evaluate, soft_labels, tasks
from wmdd.teacher import obtain

logger = logging.getLogger(__name__)

T = TypeVar("T")
Students = list[tuple[RunFolder, tasks.StudentTask]]
"""Students with the run, or the baseline, whose images they learn from"""

STAGES = ("teacher", "distill", "students", "report")


@dataclass(frozen=True)
class Share:
    """The part of a run that one process does: all of it, or one task of an array."""

    stages: tuple[str, ...] = STAGES
    """What to do; the teacher is always obtained, from the store if it is there"""
    blocks: tuple[int, ...] | None = None
    """Blocks to distil; None for all"""
    students: tuple[int, ...] | None = None
    """Positions in ``students_of``; None for all"""
    device: str | None = None
    """Device that this process must have, as ``compute.device`` names it; None for what the config says"""

    @property
    def name(self) -> str:
        """A name for this part, such as ``run``, ``blocks-3`` or ``students-0-7``."""
        parts = [
            f"{kind}-{'-'.join(map(str, sorted({min(chosen), max(chosen)})))}"
            for kind, chosen in (("blocks", self.blocks), ("students", self.students))
            if chosen
        ]
        return "-".join(parts) or ("run" if self.stages == STAGES else "-".join(self.stages))


def run(
    config: Config | str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    share: Share | None = None,
    refresh: bool = False,
) -> Path:
    """Distil a data set, train students on it and on the baselines, and write the report.

    Doing it again with the same arguments goes on where it stopped, or finds everything done.

    Args:
        config: a resolved config, or what ``load_config`` takes (``"digits"``, ``"digits+paper"``, ``"mine.toml"``).
        out: the run folder; ``runs/NAME`` by default.
        overrides: as in ``load_config``; only for a config given by name.
        share: the part to do; all by default.
        refresh: list the data set again, whatever is known of it.

    Returns:
        the run folder.

    Raises:
        InputError: the config, the data or the folder is wrong; nothing was started.
        Interrupted: a signal asked to stop; the run has checkpointed.

    Example:
        >>> import wmdd
        >>> folder = wmdd.run("digits", out="runs/example", overrides=["ipc=1", "student.seeds=1"])
        >>> wmdd.DistilledSet.load(folder).images.shape
        torch.Size([10, 1, 16, 16])
    """
    if isinstance(config, str):
        config = load_config(config, overrides)
    elif overrides:
        raise InputError("overrides go with a config that is given by name")
    folder = RunFolder(Path(out) if out is not None else Path("runs") / config.name)
    share = share or Share()
    device = share.device or config.compute.device
    here = placement_of(os.environ)
    with (
        _environment_kept(),
        log.on_screen(logging.WARNING if here.rank else logging.INFO),
        log.in_file(folder.log_file(share.name), here.rank) as open_log,
        stop_on(*STOPS) as stop,
        ranks(config.compute.replace({"device": device}), stop, here) as job,
    ):
        if stop():  # while torch was imported, or between two runs
            raise Interrupted("stopped before it began")
        _check_same(config, folder, share, job)
        with progress.reported(folder, share.name) if job.main else nullcontext():
            _run(config, folder, job, stop, share, open_log, refresh)
    return folder.path


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Give the environment back as it was: libraries leave their settings there when they are imported."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _check_same(config: Config, folder: RunFolder, share: Share, job: Ranks) -> None:
    """Refuse ranks that do not all do the same run.

    Raises:
        InputError: this rank was started with something else than rank 0.
    """
    own = digest([config.model_dump(mode="json"), str(folder.path), asdict(share)])
    if job.broadcast_from_main(own) != own:
        raise InputError(
            f"rank {job.rank} of {job.size}: started with another config, --out or share than rank 0: the tasks of one"
            " srun or torchrun do one run together; start each run by itself, with srun --exact -n 1"
        )


def _run(
    config: Config,
    folder: RunFolder,
    job: Ranks,
    stop: StopRequest,
    share: Share,
    open_log: Callable[[], None],
    refresh: bool = False,
) -> None:
    runs = runs_of(config, folder)
    for one in runs.values():
        registry.create(one)
    dataset = load_dataset(config.data, config.compute.workers, job, refresh)
    check(config, dataset)
    blocks = _chosen(partition.plan(config, len(dataset.classes)), share.blocks, "block")
    todo = _chosen(students_of(config, folder), share.students, "student")
    if job.main:
        for place, one in runs.items():
            place.bind(one, dataset.fingerprint)
            open_log()  # not before: the folder may be somebody else's
            place.sweep()
            if "distill" in share.stages and any(place.sidecar(block.index) is None for block in blocks):
                place.check_arithmetic(job.arithmetic)
        made = blocks if "distill" in share.stages else []
        trained = todo if "students" in share.stages else []
        _check_room(config, len(dataset.classes), made, trained, folder, job.size)
    if job.main and dataset.skipped:
        logger.warning(f"{len(dataset.skipped)} unreadable images are left out, such as {dataset.skipped[0]}")
    if share.stages == ("report",):  # on what there is: a teacher that failed is not trained for it
        _expect_others(runs, todo, share, stop)
        if job.main:
            _report(folder)
        return
    bound = job.broadcast_from_main(folder.bound_teacher() if job.main else None)
    open_log()
    session = open_session(config, dataset, job, stop, bound)
    if job.main and session.teacher.epochs:
        _copy_log(session.teacher.epochs, folder.epoch_log("teacher"))
    for place, one in runs.items():
        if job.main:
            write_json(place.path / "teacher.json", session.teacher.facts)
        if "distill" in share.stages:
            distill(replace(session, config=one), place, blocks)
    if not {"distill", "students"} <= set(share.stages):
        _expect_others(runs, todo, share, stop)
    if "students" in share.stages:
        for place, one in runs.items():
            own = [task for owner, task in todo if owner == place]
            with within_memory(job.device, "lower student.batch_size"):
                evaluate.evaluate(replace(session, config=one), place, own)
    job.barrier()
    if "report" in share.stages and job.main:
        _report(folder)


def _report(folder: RunFolder) -> None:
    """Write and print the report of a run."""
    from wmdd.report import collect, html, text

    collected = collect.collect([folder.path])
    html.write_html(collected, folder.path / "report.html")
    text.terminal(collected, log.console)
    logger.info(f"report: {folder.path / 'report.html'}")


def _copy_log(source: Path, target: Path) -> None:
    """Copy what the cache has of a training to the logs of this run."""
    with suppress(OSError):  # the teacher was imported, or there is no room
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _expect_others(runs: Mapping[RunFolder, Config], students: Students, share: Share, stop: StopRequest) -> None:
    """Wait until this machine sees what other processes have finished for it, perhaps a moment ago and elsewhere."""
    files: list[Path] = []
    if "students" in share.stages:
        blocks = [(place, block) for place, one in runs.items() for block in range(one.blocks)]
        files += [file for place, block in blocks for file in (place.sidecar_file(block), place.block_file(block))]
    elif "report" in share.stages:
        # A set that lacks a block has no students.
        whole = [place for place, one in runs.items() if all(map(place.sidecar, range(one.blocks)))]
        files += [evaluate.record_file(place, task) for place, task in students if place in whole]
    expect(files, stop)


def runs_of(config: Config, folder: RunFolder) -> dict[RunFolder, Config]:
    """Return the run and its baselines, each with its folder."""
    return {folder: config} | {
        RunFolder(folder.path / "baselines" / name): one for name, one in baselines_of(config).items()
    }


def students_of(config: Config, folder: RunFolder) -> Students:
    """Return all students of a run and of its baselines, in an order that the config alone decides."""
    return [
        (place, task)
        for place, one in runs_of(config, folder).items()
        for task in tasks.student_tasks(one.student, one.labels.regimes)
    ]


def entries_of(config: Config, dataset: Dataset) -> list[Path]:
    """Return the entries of the store that a run reads, as far as they are known before it begins."""
    found = []
    for arithmetic in candidates(config.compute):
        folder, teacher = obtain.name_of_stored(config, dataset, arithmetic)
        found.append(folder)
        if teacher is not None:  # statistics are named by its weights
            found.append(cache.folder("statistics", statistics.key(config, dataset, teacher, arithmetic)))
    return found


def _chosen(items: list[T], positions: Sequence[int] | None, kind: str) -> list[T]:
    if positions is None:
        return items
    if unknown := [position for position in positions if not 0 <= position < len(items)]:
        raise InputError(f"no {kind} {unknown[0]}: the run has {kind}s 0 to {len(items) - 1}")
    return [items[position] for position in positions]


def check(config: Config, dataset: Dataset) -> None:
    """Refuse a run or a baseline of it that could only fail later.

    Raises:
        InputError: a network or a method does not exist, a class is smaller than the IPC, or a method refuses the data.
    """
    tasks.check(config, len(dataset.classes))
    for one in (config, *baselines_of(config).values()):
        check_method(one, dataset)


def disk_bytes(config: Config, classes: int, blocks: int, students: int, groups: int, trained: int) -> int:
    """Return the bytes that work on a run takes on disk at its worst moment: images, labels and checkpoints.

    Args:
        config: of the run.
        classes: number of its classes.
        blocks: number of blocks that are to be made, of the run and of each baseline.
        students: number of students that are to be trained, those of baselines included.
        groups: number of groups in synthesis at a time.
        trained: number of students in training at a time.
    """
    pixels = config.data.channels * config.data.resolution**2
    runs = 1 + len(baselines_of(config))
    images = classes * config.ipc * blocks // config.blocks * runs
    group = min(partition.group_size(config), classes) * config.ipc
    # A block is held twice while it is put together, and a checkpoint has three fp32 tensors of a group.
    checkpoints = max(groups * 12 * group * pixels, trained * tasks.checkpoint_bytes(config, classes))
    labelled = stored_label_files(config, classes, students) * soft_labels.epoch_bytes(
        config.labels, classes * config.ipc, classes
    )
    return 2 * images * pixels + checkpoints + labelled


def stored_label_files(config: Config, classes: int, students: int) -> int:
    """Return the number of files of stored labels that so many students write, one an epoch."""
    regimes, images = config.labels.regimes, classes * config.ipc
    kept = [
        soft_labels.stored_epochs(config, regime, images, classes) for regime in regimes if regime in soft_labels.STORED
    ]
    # The epochs of a budget are the first ones of the stored regime, and the same files.
    return max(kept, default=0) * students // len(regimes)


def _check_room(
    config: Config, classes: int, blocks: Sequence[partition.Block], students: Students, folder: RunFolder, ranks: int
) -> None:
    """Refuse work for which the disk has no room; what was begun has most of its files already."""
    missing = sum(not folder.sidecar_file(block.index).exists() for block in blocks)
    untouched = sum(not evaluate.is_begun(place, task) for place, task in students)
    groups, trained = max(1, ranks // config.synthesis.split_class), max(1, ranks // config.student.ranks)
    needed = disk_bytes(config, classes, missing, untouched, groups, trained)
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise InputError(f"{folder.path}: needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room")
