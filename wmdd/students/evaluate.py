"""The students of a distilled set: train the missing ones, and write one record for each."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmdd.config.schema import Config, decides
from wmdd.data.synthetic import name_of
from wmdd.errors import InputError
from wmdd.networks.checkpoint import Checkpoint
from wmdd.records.comparability import complete, protocol_of
from wmdd.records.convergence import base_view
from wmdd.records.correct_bitmaps import pack
from wmdd.records.files import read_records, write_records
from wmdd.records.provenance import provenance
from wmdd.records.schema import Record
from wmdd.runs.distilled_set import MappedSet, complete_manifest, map_set
from wmdd.runs.folder import RunFolder
from wmdd.runs.work_queue import WorkQueue
from wmdd.runtime.arithmetic import Arithmetic, permits
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.team import Team
from wmdd.session import Session
from wmdd.storage.files import digest
from wmdd.students import train
from wmdd.students.tasks import StudentTask, config_for_view, student_tasks, update_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetOfStudents:
    """A distilled set and the students that are to be trained on it."""

    session: Session
    """Session of the run, or of the baseline"""
    folder: RunFolder
    tasks: tuple[StudentTask, ...]
    manifest: dict[str, Any]
    """Manifest of the complete set"""

    @staticmethod
    def open(session: Session, folder: RunFolder, tasks: Sequence[StudentTask]) -> "SetOfStudents":
        """Return the students of a complete run folder. All ranks call it; rank 0 reads the sidecars.

        Raises:
            WmddError: blocks of the set are missing. The message names them.
        """
        manifest = session.ranks.broadcast_from_main(complete_manifest(folder) if session.ranks.main else {})
        return SetOfStudents(session, folder, tuple(tasks), manifest)

    @property
    def images(self) -> int:
        """Number N of images of the set."""
        return len(self.manifest["classes"]) * self.session.config.ipc

    @property
    def sha256(self) -> str:
        """Digest of the set (``DistilledSet.sha256``)."""
        return str(self.manifest["sha256"])

    def recipe(self, regime: str, view: str) -> dict[str, object]:
        """Return all that must be equal before two students are compared."""
        circumstances = {"teacher": self.session.teacher.sha256, "arithmetic": self.session.ranks.arithmetic.facts}
        return recipe_settings(self.session.config, regime, view, self.images) | circumstances

    def is_done(self, task: StudentTask) -> bool:
        """Return whether a student has a record of this recipe on this set."""
        protocol = protocol_of(self.recipe(task.regime, task.view))
        records, _ = _read(record_file(self.folder, task))
        return any(record.protocol == protocol and record.artefact == self.sha256 for record in records)

    def updates(self, task: StudentTask) -> int:
        """Return the number of updates of a student."""
        return update_count(self.session.config, task.view, self.images)

    def set_aside_others(self) -> None:
        """Move the records of other recipes to ``RUN/superseded``: all if this process trains all students."""
        config = self.session.config
        whole = set(student_tasks(config.student, config.labels.regimes)) <= set(self.tasks)

        def wanted(record: Record) -> bool:
            return record.protocol == protocol_of(self.recipe(str(record.regime), record.view))

        set_aside(self.folder, wanted, None if whole else self.tasks)

    def train(self, task: StudentTask, distilled: MappedSet, team: Team, advance: Callable[[int], None]) -> None:
        """Train and measure one student, and write its record."""
        config, folder, name = self.session.config, self.folder, _name(task)
        recipe = self.recipe(task.regime, task.view)
        unrounded = {key: value for key, value in recipe.items() if key != "arithmetic"}
        owner = digest([protocol_of(unrounded), self.sha256])
        file, seconds = folder.student_checkpoint(name), config.compute.checkpoint_seconds
        saved = Checkpoint(file, owner, seconds, self.session.ranks.arithmetic)
        labels, log = folder.path / "labels", folder.epoch_log(name)
        result = train.train(self.session, task, distilled, team, labels, advance, saved, log)
        if team.rank == 0:
            record = _record(self.session, task, result, distilled, recipe)
            with folder.locked(_RECORDS):
                write_records(record_file(folder, task), [record])
            saved.remove()


def evaluate(sets: Sequence[SetOfStudents]) -> None:
    """Train and measure the students that have no record yet; each record is a separate file.

    The students of all sets form one queue, the longest first. Records of another recipe are moved to
    ``RUN/superseded``, so that different students are never averaged and none is lost. A process that trains all
    students of a set checks all its records. A process that trains a part checks only the records of that part.

    Args:
        sets: a run and its baselines, of one session but for the config.

    Raises:
        WmddError: blocks of a set are damaged.
        Interrupted: a stop was requested. Finished students are kept; the student in training resumes next time.
    """
    ranks, stop = sets[0].session.ranks, sets[0].session.stop
    team = ranks.team(sets[0].session.config.student.ranks, "student.ranks")
    everything = [(one, task) for one in sets for task in one.tasks]
    missing: list[int] = []
    if ranks.main:
        for one in sets:
            one.folder.merge(one.manifest)
            one.set_aside_others()
        missing = [position for position, (one, task) in enumerate(everything) if not one.is_done(task)]
        for position in sorted(set(range(len(everything))) - set(missing)):
            one, task = everything[position]
            # A checkpoint remains after a kill between record and removal.
            one.folder.student_checkpoint(_name(task)).unlink(missing_ok=True)
    todo = [everything[position] for position in ranks.broadcast_from_main(missing)]
    # Students of one set stay together, because a process holds the images of one set.
    todo.sort(key=lambda pair: -pair[0].updates(pair[1]))
    total = sum(one.updates(task) for one, task in todo)

    def lock_file(pair: tuple[SetOfStudents, StudentTask]) -> Path:
        return pair[0].folder.lock_file(_name(pair[1]))

    names = f"students of {sets[0].folder.path}"
    queue = WorkQueue(names, ranks, team, todo, lock_file, lambda pair: pair[0].is_done(pair[1]), stop)
    held: MappedSet | None = None
    try:
        with progress(f"{len(todo)} students", -(-total // team.count), "updates") as advance:
            while claimed := queue.next():
                position, (one, task) = claimed
                if held is None or held.sha256 != one.sha256:
                    held = None  # released before the next set is read
                    held = map_set(one.folder, one.manifest)
                one.train(task, held, team, advance)
                queue.release(position)
    finally:
        queue.close()


def _name(task: StudentTask) -> str:
    view = "" if task.view == "epochs" else f"-{task.view}"
    return f"student-{task.network.replace(':', '-')}-{task.regime}{view}-{task.seed:03d}"


def record_file(folder: RunFolder, task: StudentTask) -> Path:
    """Return the file of a student's record, which is written whole."""
    return folder.path / "records" / f"{_name(task)}.jsonl"


def is_begun(folder: RunFolder, task: StudentTask) -> bool:
    """Return whether a student has a record or a checkpoint."""
    return record_file(folder, task).exists() or folder.student_checkpoint(_name(task)).exists()


def set_aside(folder: RunFolder, wanted: Callable[[Record], bool], tasks: Sequence[StudentTask] | None = None) -> None:
    """Move records that are not wanted, or cannot be read, to ``RUN/superseded``.

    Several processes may do so at once, while others write records.

    Args:
        folder: run folder.
        wanted: returns whether a record stays.
        tasks: students whose records are checked; None for all records of the folder.
    """
    moved = 0
    with folder.locked(_RECORDS):
        if tasks is None:
            paths = sorted((folder.path / "records").glob("student-*.jsonl"))
        else:
            paths = [record_file(folder, task) for task in tasks]
        for path in paths:
            records, problems = _read(path)
            if problems or not all(map(wanted, records)):
                other = records[0].protocol[:8] if records else "unreadable"
                target = folder.path / "superseded" / f"{path.stem}-{other}.jsonl"
                target.parent.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # without locks, another process may move it first
                    os.replace(path, target)
                    moved += 1
    if moved:
        logger.warning(f"{moved} records of another student recipe were moved to {folder.path / 'superseded'}")


_RECORDS = "records"
"""Name of the lock under which the records of a run are written and moved."""


def _read(path: Path) -> tuple[list[Record], list[str]]:
    """Return the records and the problems of a file; both are empty if the file does not exist."""
    try:
        return read_records(path)
    except InputError:
        return [], []


def _record(
    session: Session, task: StudentTask, result: train.Result, distilled: MappedSet, recipe: dict[str, object]
) -> Record:
    config = session.config
    return Record(
        kind="student",
        run=config.name,
        dataset=name_of(config.data),
        classes=len(distilled.classes),
        resolution=config.data.resolution,
        method=config.method,
        ipc=config.ipc,
        network=task.network,
        regime=task.regime,
        view=task.view,
        distillation_seed=config.seed,
        student_seed=task.seed,
        seeded=distilled.seeded,
        evaluated_on=session.validation.on,
        test_images=result.judged.images,
        correct=pack(result.judged.correct),
        convergence="not checked",
        tuned_on=config.tuning.on,
        trials=config.tuning.trials,
        metrics=result.metrics,
        recipe=recipe,
        protocol=protocol_of(recipe),
        config=config.fingerprint("images"),
        artefact=distilled.sha256,
        cost=result.cost,
        best_epoch=None if not result.best else int(result.best["epoch"]),
        best_top1=result.best.get("top1"),
        provenance=provenance(config.compute, session.ranks.arithmetic),
    )


def recipe_settings(config: Config, regime: str, view: str, images: int) -> dict[str, object]:
    """Return the part of a student's recipe that the config decides, for a distilled set of ``images`` images."""
    seen = config_for_view(config, view, images)
    # The view decides the training length: with a fixed number of updates, the epochs depend on the set.
    unused = {"epochs" if base_view(view) == "updates" else "updates"}
    storage = {"encoding", "top_k", "budget"}
    unused |= storage - {"stored": {"encoding", "top_k"}, "budget": storage}.get(regime, set())
    unused |= {"ce_weight"} if seen.labels.loss == "kl" else set()
    settings = {
        key.partition(".")[2]: value
        for key, value in seen.flat().items()
        if decides(key, "students") and not decides(key, "images")
    }
    return {key: value for key, value in settings.items() if key not in unused} | {
        "updates": update_count(config, view, images),
        "optimizer": "adamw",
        "checkpoint": "last",
    }


def is_of_recipe(record: Record, config: Config, images: int) -> bool:
    """Return whether a student was trained as the config says, on a distilled set of ``images`` images.

    The teacher is not compared, because the config does not contain its SHA-256. The arithmetic must be one that the
    config permits on some machine.
    """
    used = Arithmetic.from_facts(record.recipe.get("arithmetic"))
    if used and not permits(config.compute, used):
        return False
    wanted = recipe_settings(config, str(record.regime), record.view, images)
    trained = complete(record.recipe)
    return all(trained.get(key) == value for key, value in wanted.items())
