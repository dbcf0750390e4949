"""What a submission will cost: GPU-hours, wall time, memory, bytes and files, from the speeds of a probe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from slurm import attempts, submissions
from slurm.profile import Resources, Stage
from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.data.batch_sources import GB, is_held
from wmdd.data.dataset import Dataset
from wmdd.distill.methods import registry
from wmdd.errors import InputError, WmddError
from wmdd.records.files import read_records
from wmdd.records.schema import Record
from wmdd.runs import class_partition
from wmdd.runs.baselines import baselines_of
from wmdd.runs.folder import RunFolder
from wmdd.storage.files import read_json
from wmdd.students import tasks as tasks_module

if TYPE_CHECKING:
    from slurm.plan import Array

_PROCESS_GB = 1.0
"""Memory of a rank that has imported torch."""
_CUDA_GB = 2.0
"""Further memory of a rank on a GPU: the libraries of CUDA, and pinned buffers."""
_DECODER_GB = 0.2
"""Memory of a process that decodes images."""


@dataclass(frozen=True)
class ClusterSpeed:
    """What is known of the cluster's speed; None where nothing is."""

    rate: float | None = None
    """Image-iterations per second of one rank in synthesis"""
    update_seconds: float | None = None
    """Seconds of one update of a student, on the ranks that train it"""
    rates: tuple[float, float] | None = None
    """Slowest and fastest group that the rate was measured on"""
    updates: tuple[float, float] | None = None
    """Fastest and slowest student that the seconds of an update were measured on"""
    batch: float | None = None
    """Images of an update that was measured"""
    start_seconds: float = 0.0
    """Seconds of a task before and after its work: imports, listing, teacher"""
    statistics_seconds: float = 0.0
    """Seconds of the statistics of one class"""
    validation_seconds: float = 0.0
    """Seconds in which a student is judged on the validation images of one class"""
    teacher_seconds: float | None = None
    """Seconds in which the teacher was trained, for each class"""


@dataclass(frozen=True)
class Hours:
    """GPU-hours of a stage (rank-hours on CPUs) and the range that its probe allows."""

    best: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What a submission will cost; None where no speed is known."""

    gpu_hours: dict[Stage, Hours | None]
    wall_seconds: dict[Stage, float | None]
    """Seconds from the first start of a stage to its last end, if ``parallel`` tasks run at a time"""
    busy: dict[Stage, float]
    """Share of the ranks' time in which they have a group or a student"""
    most_ranks: dict[Stage, int]
    """Number of ranks that can work at a time: more have nothing to do"""
    size: int
    """Bytes on disk at the worst moment"""
    inodes: int


def measured(run: Path) -> ClusterSpeed:
    """Return the speeds at which a finished run went: from its sidecars, its students' records and its attempts.

    Raises:
        InputError: the folder holds no run.
    """
    folder = RunFolder(run)
    try:
        config = Config.model_validate(read_json(run / "config.json")["config"])
    except (WmddError, KeyError):
        raise InputError(f"--rate-from {run}: holds no run (no config.json)") from None
    runs = pipeline.runs_of(config, folder)
    sidecars = [sidecar for block in range(config.blocks) if (sidecar := folder.sidecar(block)) is not None]
    groups = [group for sidecar in sidecars for group in sidecar["groups"] if group["seconds"]]
    work = [len(group["classes"]) * config.ipc * config.synthesis.iterations for group in groups]
    rates = sorted(one / group["seconds"] for one, group in zip(work, groups, strict=True))
    seconds = sum(group["seconds"] for group in groups)
    classes = sum(len(group["classes"]) for group in groups)
    counted = sum(group.get("statistics_seconds", 0.0) for group in groups)
    teacher = read_json(run / "teacher.json") if (run / "teacher.json").exists() else {}
    trained = teacher.get("seconds") if teacher.get("origin") == "trained here" else None
    speed = ClusterSpeed(
        rate=sum(work) / seconds if groups else None,
        rates=(rates[0], rates[-1]) if groups else None,
        start_seconds=_start_seconds(run, config),
        statistics_seconds=counted / classes if classes else 0.0,
        teacher_seconds=trained / classes if trained and classes else None,
    )
    return _with_students(speed, config, [record for place in runs for record in students_of(place)])


def _with_students(speed: ClusterSpeed, config: Config, records: Sequence[Record]) -> ClusterSpeed:
    """Return a speed with that of the students of a run."""
    costs = [record.cost for record in records if record.cost.get("updates")]
    if not costs:
        return speed
    judged = [cost.get("validation_seconds", 0.0) for cost in costs]
    each = sorted((cost["seconds"] - late) / cost["updates"] for cost, late in zip(costs, judged, strict=True))
    total = sum(cost["seconds"] for cost in costs) - sum(judged)
    return replace(
        speed,
        update_seconds=total / sum(cost["updates"] for cost in costs),
        updates=(each[0], each[-1]),
        batch=_batch(config, records[0].classes),
        validation_seconds=mean(judged) / records[0].classes,
    )


def _start_seconds(run: Path, config: Config) -> float:
    """Return what a task with blocks takes beside their statistics and synthesis, by its attempts; 0 if not known."""
    if not submissions.exists(run):
        return 0.0
    launched = [one for one in submissions.read(run) if one.stage == "distill"]
    known = attempts.histories(run, [one.job for one in launched])
    runs = pipeline.runs_of(config, RunFolder(run))
    found = []
    for one in launched:
        for name, items in zip(one.names(), one.tasks, strict=True):
            history = attempts.of_task(known, name)
            sidecars = [place.sidecar(item.index) for place in runs for item in items]
            if history.last == "done" and history.starts == 1 and all(sidecars):
                groups = [group for sidecar in sidecars if sidecar for group in sidecar["groups"]]
                busy = sum(group["seconds"] + group.get("statistics_seconds", 0.0) for group in groups)
                found.append(max(0.0, history.seconds - busy / one.ranks))
    return median(found) if found else 0.0


def student_seconds(
    config: Config, classes: int, speed: ClusterSpeed, update_seconds: float | None = None, growth: float = 0.5
) -> float:
    """Return the mean seconds of a student of this run: its updates and its validation; 0 when not known.

    Args:
        config: config of the run.
        classes: number of its classes.
        speed: measured speeds.
        update_seconds: seconds of an update; by default the measured mean.
        growth: exponent with which an update grows with a batch larger than the measured one: 1 where the device was
            full, 0 where it was not.
    """
    each = update_seconds or speed.update_seconds
    if not each:
        return 0.0
    images = classes * config.ipc
    updates = mean(tasks_module.update_count(config, view, images) for view in config.student.views)
    larger = max(1.0, _batch(config, classes) / speed.batch) ** growth if speed.batch else 1.0
    return updates * each * larger + classes * speed.validation_seconds


def _batch(config: Config, classes: int) -> float:
    """Return the mean number of images of an update."""
    images = classes * config.ipc
    return images / tasks_module.updates_per_epoch(config, images)


def optimized_iterations(config: Config, classes: int) -> int:
    """Return the image-iterations of the run and of those of its baselines that optimise images."""
    configs = [config, *baselines_of(config).values()]
    optimized = sum(registry.create(one).objective() is not None for one in configs)
    return optimized * classes * config.ipc * config.synthesis.iterations


def estimate(config: Config, classes: int, planned: Sequence["Array"], speed: ClusterSpeed) -> Estimate:
    """Return hours of GPUs (of ranks, on CPUs), wall time, bytes and files of what is planned.

    Without a probe that was submitted, starting, reading the images and a teacher that is trained come on top.
    """
    tasks = {array.stage: array.tasks for array in planned}
    runs = 1 + len(baselines_of(config))
    blocks = [block for task in tasks.get("distill", ()) for block in task]
    students = sum(len(task) for task in tasks.get("students", ()))
    costs = {array.stage: _cost(config, classes, array, speed) for array in planned}

    # How many ranks of a stage work at a time.
    parallel = {one.stage: min(len(one.tasks), one.resources.parallel) * one.resources.ranks for one in planned}
    groups = parallel.get("distill", 0) // config.synthesis.split_class
    trained = parallel.get("students", 0) // config.student.ranks
    starts = sum(len(array.tasks) for array in planned)
    files_of_task = sum(len(array.tasks) * (4 + 2 * array.resources.ranks) for array in planned)
    size = pipeline.disk_bytes(config, classes, len(blocks), students, groups, trained) + 30_000 * (starts + students)
    stored = pipeline.stored_label_files(config, classes, students)
    inodes = 2 * len(blocks) * runs + 2 * (groups + trained) + students + files_of_task + 4 * len(planned) + stored + 8
    return Estimate(
        gpu_hours={stage: cost.hours for stage, cost in costs.items() if stage in ("distill", "students")},
        wall_seconds={stage: cost.wall for stage, cost in costs.items()},
        busy={stage: cost.busy for stage, cost in costs.items() if stage in ("distill", "students")},
        most_ranks={stage: cost.most_ranks for stage, cost in costs.items() if stage in ("distill", "students")},
        size=size,
        inodes=inodes,
    )


@dataclass(frozen=True)
class _Cost:
    hours: Hours | None
    wall: float | None
    busy: float
    most_ranks: int


def _cost(config: Config, classes: int, array: "Array", speed: ClusterSpeed) -> _Cost:
    """Return the cost of one array: pieces of work of one length, dealt out to the teams of ranks of each task."""
    if array.stage not in ("distill", "students"):
        known = speed.teacher_seconds if array.stage == "teacher" else 0.0
        wall = None if known is None or not speed.start_seconds else speed.start_seconds + classes * known
        return _Cost(None, wall, 1.0, 1)
    ranks = array.resources.ranks
    if array.stage == "distill":
        blocks = class_partition.plan(config, classes)
        team = config.synthesis.split_class
        pieces = [sum(len(blocks[block].groups) for block in task) for task in array.tasks]
        most = sum(len(block.groups) for block in blocks) * team
        groups = max(1, sum(len(block.groups) for block in blocks))
        each = optimized_iterations(config, classes) / groups
        seconds, low, high = (each / rate if rate else None for rate in _or_range(speed.rate, speed.rates, -1))
        extra = speed.statistics_seconds * classes / groups
    else:
        team = config.student.ranks
        pieces = [len(task) for task in array.tasks]
        most = sum(pieces) * team
        seconds, low, high = (
            student_seconds(config, classes, speed, one, growth) or None
            for one, growth in zip(_or_range(speed.update_seconds, speed.updates, 1), (0.5, 0.0, 1.0), strict=True)
        )
        extra = 0.0
    teams = max(1, ranks // team)
    rounds = [-(-count // teams) for count in pieces]
    busy = sum(pieces) / max(1, teams * sum(rounds))
    if seconds is None or low is None or high is None:
        return _Cost(None, None, busy, most)
    total = sum(pieces) * team / 3600
    hours = Hours(*(total * one for one in (seconds, low, high)))
    lengths = sorted((speed.start_seconds + one * (seconds + extra) for one in rounds), reverse=True)
    return _Cost(hours, _makespan(lengths, array.resources.parallel), busy, most)


def _or_range(value: float | None, known: tuple[float, float] | None, order: int) -> tuple[float | None, ...]:
    """Return a value with the range from the one that costs least to the one that costs most."""
    low, high = (known or (value, value))[::order]
    return value, low, high


def _makespan(lengths: Sequence[float], parallel: int) -> float:
    """Return how long tasks take of which some run at a time, each new one as soon as another ends."""
    ends = [0.0] * min(len(lengths), parallel)
    for length in lengths:
        first = min(range(len(ends)), key=ends.__getitem__)
        ends[first] += length
    return max(ends)


def memory_gb(config: Config, dataset: Dataset, stage: Stage, wanted: Resources, trains_teacher: bool) -> float:
    """Return about how much memory the ranks of a node need in a stage, in GB.

    Counts what grows with the dataset: the decoded images that the node holds (``data.memory_gb``), and the processes.
    Mapped files do not count, nor does the memory of the device, nor, on a CPU, what the networks need.
    """
    here, pixels = wanted.ranks_per_node, config.data.channels * config.data.resolution**2
    copies = min(config.teacher.ranks, here)
    validation = dataset.validation.nbytes if here == 1 and is_held(dataset.validation, config, 1) else 0
    train = copies * dataset.train.nbytes if trains_teacher and is_held(dataset.train, config, copies) else 0
    group = class_partition.group_images(config, len(dataset.classes))
    ahead = here * dataset.train.nbytes * group // (config.ipc * len(dataset.classes))
    held = {
        "teacher": train + validation * trains_teacher,
        "distill": here * 16 * group * pixels + min(ahead, config.data.memory_gb * GB),
        "students": validation,
        "report": 0,
    }[stage]
    workers = 0 if stage == "report" else min(config.compute.workers, wanted.cpus_per_rank)
    process = _PROCESS_GB + workers * _DECODER_GB + (_CUDA_GB if wanted.gpus_per_rank else 0.0)
    return here * process + held / GB


def students_of(folder: RunFolder) -> list[Record]:
    """Return the records of the students of a run."""
    place = folder.path / "records"
    return [record for record in read_records(place)[0] if record.kind == "student"] if place.exists() else []
