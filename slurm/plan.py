"""From a run to arrays: which blocks and students are missing, how many go into a task, what it will cost."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.profile import STAGES, Profile, Resources, Stage
from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset
from wmdd.distill.methods import registry
from wmdd.errors import InputError, WmddError
from wmdd.records.files import read_records
from wmdd.records.schema import Record
from wmdd.runs import partition
from wmdd.runs.baselines import baselines_of
from wmdd.runs.folder import RunFolder
from wmdd.runtime.arithmetic import candidates
from wmdd.storage.files import read_json
from wmdd.students import evaluate
from wmdd.students.tasks import StudentTask
from wmdd.teacher import obtain

Items = tuple[int, ...]


@dataclass(frozen=True)
class ClusterSpeed:
    """What is known of the cluster's speed; None where nothing is."""

    rate: float | None = None
    """Image-iterations per second of one rank in synthesis"""
    student_minutes: float | None = None
    """Minutes of one student on one rank"""


@dataclass(frozen=True)
class Array:
    """The tasks of one stage."""

    stage: Stage
    tasks: tuple[Items, ...]
    """Blocks or students of each task; one task without any for the teacher and for the report"""
    resources: Resources


def measured(run: Path) -> ClusterSpeed:
    """Return the speed at which a finished run went, per rank: from its sidecars and its students' records.

    Raises:
        InputError: the folder holds no run.
    """
    folder = RunFolder(run)
    try:
        config = Config.model_validate(read_json(run / "config.json")["config"])
    except (WmddError, KeyError):
        raise InputError(f"--rate-from {run}: holds no run (no config.json)") from None
    groups = [
        group
        for block in range(config.blocks)
        if (sidecar := folder.sidecar(block)) is not None
        for group in sidecar["groups"]
    ]
    work = sum(len(group["classes"]) for group in groups) * config.ipc * config.synthesis.iterations
    seconds = sum(group["seconds"] for group in groups)
    students = [record.cost["seconds"] for record in _students(folder) if "seconds" in record.cost]
    return ClusterSpeed(work / seconds if seconds else None, sum(students) / len(students) / 60 if students else None)


def blocks_for(config: Config, classes: int, speed: ClusterSpeed, minutes: float, ranks: int) -> int:
    """Return how many blocks make tasks of about ``minutes``: one a group when the rate is not known.

    A task of seconds is all start-up, and one of a day loses much when it dies.  A task never has fewer groups than
    ranks.
    """
    groups = len(partition.plan(config.replace({"blocks": 1}), classes)[0].groups)
    most = max(1, groups // ranks)
    if speed.rate is None:
        return most
    seconds = _iterations(config, classes) / speed.rate
    return min(most, max(1, math.ceil(seconds / (60 * minutes * ranks))))


def chunks(items: Sequence[int], size: int, limit: int) -> tuple[Items, ...]:
    """Deal items out to tasks of ``size``, or larger ones where the array would exceed ``limit`` tasks."""
    size = max(1, size, math.ceil(len(items) / limit))
    return tuple(tuple(items[start : start + size]) for start in range(0, len(items), size))


def arrays(
    config: Config,
    folder: RunFolder,
    dataset: Dataset,
    profile: Profile,
    speed: ClusterSpeed,
    minutes: float,
    limit: int,
    stages: Sequence[Stage] = STAGES,
    queued: dict[Stage, set[int]] | None = None,
) -> list[Array]:
    """Return what is missing of a run, as arrays in the order in which they depend on each other.

    Args:
        config: of the run.
        folder: of the run; need not exist.
        dataset: its images.
        profile: resources of each stage.
        speed: decides how many students share a task.
        minutes: target length of a task.
        limit: most tasks of one array.
        stages: those wanted.
        queued: items of earlier submissions that are still in the queue, and left to them.
    """
    queued = queued or {}
    students = profile.stages["students"]
    together = int(minutes / speed.student_minutes) * students.ranks if speed.student_minutes else students.ranks
    blocks = [index for index in missing_blocks(config, folder) if index not in queued.get("distill", ())]
    todo = [index for index in missing_students(config, folder) if index not in queued.get("students", ())]
    tasks: dict[Stage, tuple[Items, ...]] = {
        "teacher": (),
        "distill": chunks(blocks, 1, limit) if "distill" in stages else (),
        "students": chunks(todo, together, limit) if "students" in stages else (),
        "report": (),
    }
    waiting = bool(tasks["distill"] or tasks["students"])
    if "teacher" in stages and "teacher" not in queued and not _has_teacher(config, folder, dataset, profile):
        tasks["teacher"] = ((),)
    if "report" in stages and (waiting or not (folder.path / "report.html").exists()) and "report" not in queued:
        tasks["report"] = ((),)
    return [Array(stage, tasks[stage], profile.stages[stage]) for stage in STAGES if tasks[stage]]


def _has_teacher(config: Config, folder: RunFolder, dataset: Dataset, profile: Profile) -> bool:
    """Return whether the teacher is in the cache, in an arithmetic that the config may mean on the profile's nodes."""
    on_gpus = profile.stages["teacher"].gpus and config.compute.device != "cpu"
    arithmetics = candidates(config.compute, "cuda" if on_gpus else "cpu")
    return obtain.is_stored(config, dataset, arithmetics, folder.bound_teacher())


def missing_blocks(config: Config, folder: RunFolder) -> list[int]:
    """Return the blocks that the run or one of its baselines lacks."""
    runs = pipeline.runs_of(config, folder)
    return [block for block in range(config.blocks) if any(not _whole(place, block) for place in runs)]


def missing_students(config: Config, folder: RunFolder) -> list[int]:
    """Return the positions of the students that have no record on the distilled sets as they are."""
    known = set()
    for place in pipeline.runs_of(config, folder):
        manifest = _manifest(place)
        if manifest is None:
            continue
        for record in _students(place):
            same = evaluate.is_of_recipe(record, config, len(manifest["classes"]) * config.ipc)
            if same and record.artefact == manifest["sha256"]:
                known.add(
                    (place, StudentTask(record.network, str(record.regime), int(record.student_seed or 0), record.view))
                )
    return [position for position, one in enumerate(pipeline.students_of(config, folder)) if one not in known]


@dataclass(frozen=True)
class Estimate:
    """What a submission will cost; None where no speed is known."""

    gpu_hours: dict[Stage, float | None]
    size: int
    """Bytes on disk at the worst moment"""
    inodes: int


def estimate(config: Config, classes: int, planned: Sequence[Array], speed: ClusterSpeed) -> Estimate:
    """Return the hours of GPUs (of ranks, on CPUs), bytes and files of what is planned.

    The hours are those of synthesis and students at the given speed: starting, reading the images and a teacher that
    is trained here come on top.
    """
    tasks = {array.stage: array.tasks for array in planned}
    runs = 1 + len(baselines_of(config))
    blocks = [block for task in tasks.get("distill", ()) for block in task]
    students = sum(len(task) for task in tasks.get("students", ()))
    hours: dict[Stage, float | None] = {}
    if blocks:
        share = len(blocks) / config.blocks
        hours["distill"] = _iterations(config, classes) * share / speed.rate / 3600 if speed.rate else None
    if students:
        hours["students"] = students * speed.student_minutes / 60 if speed.student_minutes else None

    # How many ranks of a stage work at a time.
    parallel = {one.stage: min(len(one.tasks), one.resources.parallel) * one.resources.ranks for one in planned}
    groups = parallel.get("distill", 0) // config.synthesis.split_class
    trained = parallel.get("students", 0) // config.student.ranks
    starts = sum(len(array.tasks) for array in planned)
    files_of_task = sum(len(array.tasks) * (2 + 2 * array.resources.ranks) for array in planned)
    size = pipeline.disk_bytes(config, classes, len(blocks), students, groups, trained) + 30_000 * (starts + students)
    stored = pipeline.stored_label_files(config, classes, students)
    inodes = 2 * len(blocks) * runs + 2 * (groups + trained) + students + files_of_task + 2 * len(planned) + stored + 8
    return Estimate(hours, size, inodes)


def _iterations(config: Config, classes: int) -> int:
    """Return the image-iterations of the run and of those of its baselines that optimise images."""
    configs = [config, *baselines_of(config).values()]
    optimized = sum(registry.create(one).objective() is not None for one in configs)
    return optimized * classes * config.ipc * config.synthesis.iterations


def _whole(folder: RunFolder, block: int) -> bool:
    return folder.sidecar(block) is not None and folder.damaged(block) is None


def _manifest(folder: RunFolder) -> dict[str, Any] | None:
    """Return the manifest of a whole distilled set."""
    try:
        manifest = folder.manifest()
    except (WmddError, json.JSONDecodeError):
        return None
    return manifest if manifest["sha256"] else None


def _students(folder: RunFolder) -> list[Record]:
    place = folder.path / "records"
    return [record for record in read_records(place)[0] if record.kind == "student"] if place.exists() else []
