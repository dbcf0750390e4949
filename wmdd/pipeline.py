"""The stages of a run, in order. Each reads and writes through the run folder, and resumes where it stopped."""

import filecmp
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
from wmdd.data.batch_sources import copies_on_node, is_held
from wmdd.data.dataset import Dataset, load_dataset
from wmdd.distill import statistics
from wmdd.distill.blocks import check as check_method
from wmdd.distill.blocks import distill
from wmdd.distill.methods import registry
from wmdd.errors import InputError, Interrupted
from wmdd.runs import class_partition, progress
from wmdd.runs.baselines import baselines_of
from wmdd.runs.folder import RunFolder
from wmdd.runtime import log
from wmdd.runtime.arithmetic import candidates
from wmdd.runtime.memory import free_memory, within_memory
from wmdd.runtime.placement import placement_of
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.signals import STOPS, StopRequest, stop_on
from wmdd.session import open_session
from wmdd.storage import cache
from wmdd.storage.files import digest, expect
from wmdd.students import evaluate, soft_labels, tasks
from wmdd.teacher import obtain

logger = logging.getLogger(__name__)

T = TypeVar("T")
Students = list[tuple[RunFolder, tasks.StudentTask]]
"""Students, each with the folder of the run or baseline whose images it trains on"""

STAGES = ("teacher", "distill", "students", "report")


@dataclass(frozen=True)
class Share:
    """The part of a run that one process does: the whole run, or one task of an array."""

    stages: tuple[str, ...] = STAGES
    """Stages to do. The teacher is always loaded from the cache, or trained if it is missing"""
    blocks: tuple[int, ...] | None = None
    """Blocks to distill; None for all"""
    students: tuple[int, ...] | None = None
    """Students to train, as positions in ``students_of``; None for all"""
    device: str | None = None
    """Device of this process, as ``compute.device`` names it; None for the config's"""

    @property
    def name(self) -> str:
        """Name of this part, such as ``run``, ``blocks-3`` or ``students-0-7``."""
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
    """Distill a dataset, train students on it and on the baselines, and write the report.

    A second call with the same arguments resumes where the first stopped. It does nothing if the run is complete.

    Args:
        config: resolved config, or its name as ``load_config`` takes it (``"digits"``, ``"digits+paper"``,
            ``"mine.toml"``).
        out: run folder; ``runs/NAME`` by default.
        overrides: ``key=value`` strings, as in ``load_config``; only for a config given by name.
        share: part of the run to do; all of it by default.
        refresh: whether to list the dataset again, even if the cache holds its listing.

    Returns:
        Path of the run folder.

    Raises:
        InputError: the config, the dataset or the folder is wrong. No work was started.
        Interrupted: a signal requested a stop. The run wrote its checkpoints.

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
        if stop():  # the signal came while torch was imported, or between two runs
            raise Interrupted("stopped before the run began")
        _check_same(config, folder, share, job)
        with progress.reported(folder, share.name) if job.main else nullcontext():
            _run(config, folder, job, stop, share, open_log, refresh)
    return folder.path


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment at the end: libraries change it when they are imported."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _check_same(config: Config, folder: RunFolder, share: Share, job: Ranks) -> None:
    """Check that all ranks do the same run.

    Raises:
        InputError: this rank has another config, folder or share than rank 0.
    """
    own = digest([config.model_dump(mode="json"), str(folder.path), asdict(share)])
    if job.broadcast_from_main(own) != own:
        raise InputError(
            f"rank {job.rank} of {job.size}: started with another config, --out or share than rank 0. All tasks of one"
            " srun or torchrun share one run; start separate runs with srun --exact -n 1"
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
    blocks = _chosen(class_partition.plan(config, len(dataset.classes)), share.blocks, "block")
    todo = _chosen(students_of(config, folder), share.students, "student")
    if job.main:
        for place, one in runs.items():
            place.bind(one, dataset.fingerprint)
            open_log()  # only now: until it is bound, the folder may belong to another run
            place.sweep()
            if "distill" in share.stages and any(place.sidecar(block.index) is None for block in blocks):
                place.check_arithmetic(job.arithmetic)
        made = blocks if "distill" in share.stages else []
        trained = todo if "students" in share.stages else []
        _check_room(config, len(dataset.classes), made, trained, folder, job.size)
        check_memory(memory_needs(config, dataset, made, job), free_memory())
    if job.main and dataset.skipped:
        logger.warning(f"{len(dataset.skipped)} unreadable images are left out, such as {dataset.skipped[0]}")
    if share.stages == ("report",):  # reports what exists, and needs no teacher
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
            place.keep_teacher(session.teacher.facts)
        if "distill" in share.stages:
            distill(replace(session, config=one), place, blocks)
    if not {"distill", "students"} <= set(share.stages):
        _expect_others(runs, todo, share, stop)
    if "students" in share.stages:
        sets = [
            evaluate.SetOfStudents.open(replace(session, config=one), place, own)
            for place, one in runs.items()
            if (own := [task for owner, task in todo if owner == place])
        ]
        if sets:
            with within_memory(job.device, "lower student.batch_size"):
                evaluate.evaluate(sets)
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
        if not (target.exists() and filecmp.cmp(source, target, shallow=False)):
            shutil.copyfile(source, target)


def _expect_others(runs: Mapping[RunFolder, Config], students: Students, share: Share, stop: StopRequest) -> None:
    """Wait for the files of other processes: a shared file system may show them late on this machine."""
    files: list[Path] = []
    if "students" in share.stages:
        used = {place for place, _ in students}
        blocks = [(place, block) for place, one in runs.items() if place in used for block in range(one.blocks)]
        files += [file for place, block in blocks for file in (place.sidecar_file(block), place.block_file(block))]
    elif "report" in share.stages:
        # No student trains on a set that lacks a block.
        whole = [place for place, one in runs.items() if all(map(place.sidecar, range(one.blocks)))]
        files += [evaluate.record_file(place, task) for place, task in students if place in whole]
    expect(files, stop)


def runs_of(config: Config, folder: RunFolder) -> dict[RunFolder, Config]:
    """Return the run and its baselines, each with its folder."""
    return {folder: config} | {
        RunFolder(folder.path / "baselines" / name): one for name, one in baselines_of(config).items()
    }


def students_of(config: Config, folder: RunFolder) -> Students:
    """Return all students of a run and of its baselines. Their order depends on the config alone."""
    return [
        (place, task)
        for place, one in runs_of(config, folder).items()
        for task in tasks.student_tasks(one.student, one.labels.regimes)
    ]


def entries_of(config: Config, dataset: Dataset) -> list[Path]:
    """Return the cache entries that a run reads, as far as they are known before it begins."""
    found = []
    for arithmetic in candidates(config.compute):
        folder, teacher = obtain.name_of_stored(config, dataset, arithmetic)
        found.append(folder)
        if teacher is not None:  # the key of the statistics contains its SHA-256
            found.append(cache.folder("statistics", statistics.key(config, dataset, teacher, arithmetic)))
    return found


def _chosen(items: list[T], positions: Sequence[int] | None, kind: str) -> list[T]:
    if positions is None:
        return items
    if unknown := [position for position in positions if not 0 <= position < len(items)]:
        raise InputError(f"no {kind} {unknown[0]}: the run has {kind}s 0 to {len(items) - 1}")
    return [items[position] for position in positions]


def check(config: Config, dataset: Dataset) -> None:
    """Check a run and its baselines for errors that would otherwise appear only later.

    Raises:
        InputError: a network or method does not exist, a class has fewer images than the IPC, or a method cannot use
            this dataset.
    """
    tasks.check(config, len(dataset.classes))
    for one in (config, *baselines_of(config).values()):
        optimizes = check_method(one, dataset).objective() is not None
        if optimizes and class_partition.is_spread(one) != class_partition.is_spread(config):
            raise InputError(
                f"student.baselines: {one.method} groups images over many classes and {config.method} does not, or the"
                " other way round; run it by itself, or both in one protocol (wmdd bench protocol)"
            )


def disk_bytes(config: Config, classes: int, blocks: int, students: int, groups: int, trained: int) -> int:
    """Return the most bytes on disk that a run needs at any moment: images, labels and checkpoints.

    Args:
        config: config of the run.
        classes: number of classes.
        blocks: number of blocks to distill, of the run and of each baseline.
        students: number of students to train, those of baselines included.
        groups: number of groups synthesized at the same time.
        trained: number of students trained at the same time.
    """
    pixels = config.data.channels * config.data.resolution**2
    runs = 1 + len(baselines_of(config))
    images = classes * config.ipc * blocks // config.blocks * runs
    group = class_partition.group_images(config, classes)
    # A block is held twice while it is put together, and a checkpoint has three fp32 tensors of a group.
    checkpoints = max(groups * 12 * group * pixels, trained * tasks.checkpoint_bytes(config, classes))
    labelled = stored_label_files(config, classes, students) * soft_labels.epoch_bytes(
        config.labels, classes * config.ipc, classes
    )
    return 2 * images * pixels + checkpoints + labelled


def stored_label_files(config: Config, classes: int, students: int) -> int:
    """Return the number of label files that ``students`` students write: one per epoch."""
    regimes, images = config.labels.regimes, classes * config.ipc
    kept = [
        soft_labels.stored_epochs(config, regime, images, classes) for regime in regimes if regime in soft_labels.STORED
    ]
    # The regime ``budget`` reads the first files of the regime ``stored``.
    return max(kept, default=0) * students // len(regimes)


def _check_room(
    config: Config,
    classes: int,
    blocks: Sequence[class_partition.Block],
    students: Students,
    folder: RunFolder,
    ranks: int,
) -> None:
    """Check that the disk has room. Students in training are not counted: they have most of their files already."""
    missing = sum(not folder.sidecar_file(block.index).exists() for block in blocks)
    untouched = sum(not evaluate.is_begun(place, task) for place, task in students)
    groups, trained = max(1, ranks // config.synthesis.split_class), max(1, ranks // config.student.ranks)
    needed = disk_bytes(config, classes, missing, untouched, groups, trained)
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise InputError(f"{folder.path}: needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room")


def memory_needs(
    config: Config, dataset: Dataset, blocks: Sequence[class_partition.Block], job: Ranks
) -> dict[str, tuple[int, str]]:
    """Return the bytes that the ranks of a node hold at once for a run, and the remedy, by what they hold.

    Mapped files are not counted: the system gives their memory to others when it is short.
    """
    here = copies_on_node(job.size)
    needs: dict[str, tuple[int, str]] = {}
    copies = copies_on_node(config.teacher.ranks)
    trained = not config.teacher.weights and not obtain.is_stored(config, dataset, [job.arithmetic])
    if trained and is_held(dataset.train, config, copies):
        needs["the teacher's images"] = copies * dataset.train.nbytes, "lower data.memory_gb"
    if here == 1 and is_held(dataset.validation, config, 1):
        needs["the validation images"] = dataset.validation.nbytes, "lower data.memory_gb"
    if blocks:
        largest = max(len(block.classes) for block in blocks) * config.ipc * dataset.train.nbytes // len(dataset.train)
        assembling = max(1, min(here // config.synthesis.split_class, len(blocks)))
        needs["blocks that are put together"] = 2 * largest * assembling, "use more blocks, or fewer ranks on a node"
    return needs


def check_memory(needs: Mapping[str, tuple[int, str]], free: int) -> None:
    """Check that a node has the memory that a run needs.

    Args:
        needs: bytes and remedy of each need (``memory_needs``).
        free: bytes of free memory.

    Raises:
        InputError: the needs exceed the free memory. The message names the largest need and its remedy.
    """
    total = sum(size for size, _ in needs.values())
    if total > free:
        what, (size, remedy) = max(needs.items(), key=lambda need: need[1][0])
        raise InputError(
            f"the run needs {total / 1e9:,.1f} GB of memory on this node, {size / 1e9:,.1f} GB of it for {what};"
            f" {free / 1e9:,.1f} GB are free; {remedy}"
        )
