"""The students of a distilled set: train the missing ones, and write one record for each."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from wmdd.config.schema import Config, decides
from wmdd.data.synthetic import name_of
from wmdd.errors import InputError
from wmdd.networks.checkpoint import Checkpoint
from wmdd.records.bitmaps import pack
from wmdd.records.convergence import base_view
from wmdd.records.files import read_records, write_records
from wmdd.records.likeness import complete, protocol_of
from wmdd.records.provenance import provenance
from wmdd.records.schema import Record
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runs.folder import RunFolder
from wmdd.runtime.arithmetic import Arithmetic, permits
from wmdd.runtime.progress_bars import progress
from wmdd.session import Session
from wmdd.storage.files import digest
from wmdd.students import train
from wmdd.students.tasks import StudentTask, config_for_view, student_tasks, update_count

logger = logging.getLogger(__name__)


def evaluate(session: Session, folder: RunFolder, tasks: list[StudentTask]) -> None:
    """Train and measure the students that have no record yet; each record is a separate file.

    Records of another recipe are moved to ``RUN/superseded``, so that different students are never averaged and none is
    lost. A process that trains all students checks all records. A process that trains a part checks only the records of
    that part.

    Raises:
        WmddError: blocks of the set are missing or damaged.
        Interrupted: a stop was requested. Finished students are kept; the student in training resumes next time.
    """
    config, ranks = session.config, session.ranks
    if ranks.main:
        folder.merge()
    distilled = DistilledSet.load(folder.path)

    def recipe(regime: str, view: str) -> dict[str, object]:
        # Two students can be compared only if all of this is equal.
        circumstances = {"teacher": session.teacher.sha256, "arithmetic": ranks.arithmetic.facts}
        return recipe_settings(config, regime, view, len(distilled)) | circumstances

    if ranks.main:
        mine = None if set(student_tasks(config.student, config.labels.regimes)) <= set(tasks) else tasks
        set_aside(folder, lambda record: record.protocol == protocol_of(recipe(str(record.regime), record.view)), mine)

    def done(task: StudentTask) -> bool:
        file, protocol = record_file(folder, task), protocol_of(recipe(task.regime, task.view))
        records, _ = _read(file)
        return any(record.protocol == protocol and record.artefact == distilled.sha256 for record in records)

    missing = [position for position, task in enumerate(tasks) if not done(task)]
    if ranks.main:  # checkpoints that remain after a kill between record and removal
        for position in set(range(len(tasks))) - set(missing):
            folder.student_checkpoint(_name(tasks[position])).unlink(missing_ok=True)
    team = ranks.team(config.student.ranks, "student.ranks")
    todo = [tasks[position] for position in team.deal(ranks.broadcast_from_main(missing))]
    updates = {task: update_count(config, task.view, len(distilled)) for task in todo}
    with progress(f"{len(todo)} students on {config.method}", sum(updates.values()), "updates") as advance:
        for task in todo:
            with folder.locked(_name(task), session.stop) if team.size == 1 else nullcontext():
                if team.size == 1 and done(task):
                    advance(updates[task])  # another process has trained it
                    continue
                own, labels = recipe(task.regime, task.view), folder.path / "labels"
                unrounded = {key: value for key, value in own.items() if key != "arithmetic"}
                owner = digest([protocol_of(unrounded), distilled.sha256])
                file, seconds = folder.student_checkpoint(_name(task)), config.compute.checkpoint_seconds
                saved = Checkpoint(file, owner, seconds, ranks.arithmetic)
                result = train.train(
                    session, task, distilled, team, labels, advance, saved, folder.epoch_log(_name(task))
                )
                if team.rank == 0:
                    record = _record(session, task, result, distilled, own)
                    with folder.locked(_RECORDS):
                        write_records(record_file(folder, task), [record])
                    saved.remove()


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
    session: Session, task: StudentTask, result: train.Result, distilled: DistilledSet, recipe: dict[str, object]
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
