"""From a run to arrays: which blocks and students are missing, and how many of them go into a task."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slurm.estimate import ClusterSpeed, optimized_iterations, student_seconds, students_of
from slurm.profile import STAGES, Profile, Resources, Stage
from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset
from wmdd.errors import InputError, WmddError
from wmdd.runs import class_partition
from wmdd.runs.folder import RunFolder
from wmdd.runtime.arithmetic import candidates
from wmdd.students import evaluate
from wmdd.students.tasks import StudentTask
from wmdd.teacher import obtain

Items = tuple[int, ...]
LARGEST_ARRAY = 1000
"""Tasks of the largest array: each has a folder in that of the array."""


@dataclass(frozen=True)
class Array:
    """The tasks of one stage."""

    stage: Stage
    tasks: tuple[Items, ...]
    """Blocks or students of each task; one task without any for the teacher and for the report"""
    resources: Resources


@dataclass(frozen=True)
class Selection:
    """The part of a run that a submission is about."""

    stages: Sequence[Stage] = STAGES
    blocks: Collection[int] | None = None
    """Blocks to submit; None: all that are missing"""
    queued: Mapping[Stage, Collection[int]] = field(default_factory=dict)
    """Items of earlier submissions that are still in the queue, and left to them"""

    def check(self, blocks: int) -> None:
        """Refuse blocks that the run does not have.

        Raises:
            InputError: there is one.
        """
        if wrong := [block for block in self.blocks or () if block >= blocks]:
            raise InputError(f"--only-blocks {wrong[0]}: the run has blocks 0 to {blocks - 1}")


@dataclass(frozen=True)
class TaskSize:
    """How much work goes into one task."""

    minutes: float
    """Target duration of a task"""
    speed: ClusterSpeed
    limit: int = LARGEST_ARRAY
    """Largest number of tasks of one array"""


def blocks_for(config: Config, classes: int, size: TaskSize, ranks: int) -> int:
    """Return how many blocks make tasks of the target duration: one a group when the rate is not known.

    A task of seconds is all start-up, and one of a day loses much when it dies.  A task never has fewer groups than
    ranks, or than teams where ``synthesis.split_class`` ranks share a group.
    """
    groups = len(class_partition.plan(config.replace({"blocks": 1}), classes)[0].groups)
    most = max(1, groups * config.synthesis.split_class // ranks)
    if size.speed.rate is None:
        return most
    seconds = optimized_iterations(config, classes) / size.speed.rate
    return min(most, max(1, math.ceil(seconds / (60 * size.minutes * ranks))))


def students_a_task(config: Config, classes: int, size: TaskSize, ranks: int) -> int:
    """Return how many students fill a task of the target duration: at least one for each team of ranks."""
    teams = max(1, ranks // config.student.ranks)
    seconds = student_seconds(config, classes, size.speed)
    return teams * max(1, int(60 * size.minutes / seconds)) if seconds else teams


def chunks(items: Sequence[int], size: int, limit: int) -> tuple[Items, ...]:
    """Deal items out to tasks of ``size``, or larger ones where the array would exceed ``limit`` tasks."""
    size = max(1, size, math.ceil(len(items) / limit))
    return tuple(tuple(items[start : start + size]) for start in range(0, len(items), size))


def arrays(
    config: Config, folder: RunFolder, dataset: Dataset, profile: Profile, size: TaskSize, selection: Selection
) -> list[Array]:
    """Return what is missing of a run, as arrays in the order in which they depend on each other.

    Args:
        config: config of the run.
        folder: folder of the run; need not exist.
        dataset: its images.
        profile: resources of each stage.
        size: decides how many blocks or students share a task.
        selection: what is wanted.  Where only some blocks are, students and report come with the last of them.
    """
    stages, queued = selection.stages, selection.queued
    lacking = [index for index in missing_blocks(config, folder) if index not in queued.get("distill", ())]
    blocks = [index for index in lacking if selection.blocks is None or index in selection.blocks]
    if len(blocks) < len(lacking) and "distill" in stages:
        stages = [stage for stage in stages if stage in ("teacher", "distill")]
    todo = [index for index in missing_students(config, folder) if index not in queued.get("students", ())]
    together = students_a_task(config, len(dataset.classes), size, profile.stages["students"].ranks)
    tasks: dict[Stage, tuple[Items, ...]] = {
        "teacher": (),
        "distill": chunks(blocks, 1, size.limit) if "distill" in stages else (),
        "students": chunks(todo, together, size.limit) if "students" in stages else (),
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
        for record in students_of(place):
            same = evaluate.is_of_recipe(record, config, len(manifest["classes"]) * config.ipc)
            if same and record.artefact == manifest["sha256"]:
                known.add(
                    (place, StudentTask(record.network, str(record.regime), int(record.student_seed or 0), record.view))
                )
    return [position for position, one in enumerate(pipeline.students_of(config, folder)) if one not in known]


def _whole(folder: RunFolder, block: int) -> bool:
    return folder.sidecar(block) is not None and folder.damaged(block) is None


def _manifest(folder: RunFolder) -> dict[str, Any] | None:
    """Return the manifest of a whole distilled set."""
    try:
        manifest = folder.manifest()
    except (WmddError, json.JSONDecodeError):
        return None
    return manifest if manifest["sha256"] else None
