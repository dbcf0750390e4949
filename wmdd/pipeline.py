"""The stages of a run, in order; each reads and writes through the run folder, and each goes on where it stopped."""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from wmdd import console, distill, methods, rundir, student
from wmdd.config import Config, load_config
from wmdd.data import Dataset, load_dataset
from wmdd.distilled import DistilledSet
from wmdd.distributed import Ranks, ranks
from wmdd.errors import InputError
from wmdd.files import digest, write_json
from wmdd.records import Record, provenance, read_records, write_records
from wmdd.rundir import RunFolder
from wmdd.signals import StopRequest, stop_on
from wmdd.teacher import Teacher, obtain
from wmdd.validation import Validation


def run(
    config: Config | str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    only_blocks: Sequence[int] | None = None,
) -> Path:
    """Distil a data set, train students on it and on the baselines, and write the report.

    Doing it again with the same arguments goes on where it stopped, or finds everything done.

    Args:
        config: a resolved config, or what ``load_config`` takes (``"digits"``, ``"digits+paper"``, ``"mine.toml"``).
        out: the run folder; ``runs/NAME`` by default.
        overrides: as in ``load_config``; only for a config given by name.
        only_blocks: distil these blocks and stop there, as one task of an array does.

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
    with ranks(config.compute) as job, stop_on(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2) as stop:
        console.quiet = not job.main
        _run(config, folder, job, stop, only_blocks)
    return folder.path


def _run(config: Config, folder: RunFolder, job: Ranks, stop: StopRequest, only_blocks: Sequence[int] | None) -> None:
    runs = {folder: config} | {
        RunFolder(folder.path / "baselines" / name): baseline(config, name) for name in config.student.baselines
    }
    for one in runs.values():
        methods.create(one)
    dataset = load_dataset(config.data, config.compute.workers)
    _check(config, dataset)
    blocks = rundir.plan(config, len(dataset.classes))
    if only_blocks is not None:
        if unknown := [index for index in only_blocks if not 0 <= index < len(blocks)]:
            raise InputError(f"--only-blocks: no block {unknown[0]}; the run has blocks 0 to {len(blocks) - 1}")
        blocks = [blocks[index] for index in only_blocks]
    if job.main:
        for place, one in runs.items():
            place.bind(one, dataset.fingerprint)
        _check_room(config, dataset, folder.path)
    if dataset.skipped:
        console.say(f"{len(dataset.skipped)} unreadable images are left out, such as {dataset.skipped[0]}")
    validation = Validation(config, dataset, job)
    teacher = obtain(config, dataset, validation, job, stop)
    for place, one in runs.items():
        if job.main:
            write_json(place.path / "teacher.json", teacher.facts)
        distill.distill(distill.Job(one, dataset, teacher, job, place, stop), blocks)
    if only_blocks is not None:
        return
    for place, one in runs.items():
        _students(one, place, dataset, teacher, validation, job, stop)
    job.barrier()
    if job.main:
        from wmdd import report

        collected = report.collect([folder.path])
        report.write_html(collected, folder.path / "report.html")
        report.render_terminal(collected, console.console)
        console.say(f"report: {folder.path / 'report.html'}")


def baseline(config: Config, method: str) -> Config:
    """Return the config of a baseline: the same run with another method, and no baselines of its own."""
    unbranched = config.student.model_copy(update={"baselines": ()})
    return config.model_copy(update={"name": f"{config.name}/{method}", "method": method, "student": unbranched})


def _check(config: Config, dataset: Dataset) -> None:
    """Refuse what could only fail later: networks that do not exist, classes smaller than the IPC."""
    student.check(config, len(dataset.classes))
    distill.check(config, dataset)


def _check_room(config: Config, dataset: Dataset, path: Path) -> None:
    pixels = config.data.channels * config.data.resolution**2
    images = len(dataset.classes) * config.ipc * (1 + len(config.student.baselines))
    # A block is held twice while it is put together, and a checkpoint has three fp32 tensors of a group.
    needed = 2 * images * pixels + 12 * 100 * pixels
    free = shutil.disk_usage(path).free
    if free < needed:
        raise InputError(f"{path}: needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room")


def _students(
    config: Config,
    folder: RunFolder,
    dataset: Dataset,
    teacher: Teacher,
    validation: Validation,
    job: Ranks,
    stop: StopRequest,
) -> None:
    distilled = DistilledSet.load(folder.path) if job.main else None
    job.barrier()
    distilled = distilled or DistilledSet.load(folder.path)
    updates = student.update_count(config, len(distilled))
    recipe = _recipe(config, teacher, updates)
    protocol = digest(recipe)
    records = read_records(folder.path / "records")[0] if (folder.path / "records").exists() else []
    known = {
        (record.network, record.regime, record.student_seed)
        for record in records
        if record.protocol == protocol and record.artefact == distilled.sha256
    }
    todo = [
        task
        for task in job.share(student.tasks(config.student, config.labels.regimes))
        if (task.network, task.regime, task.seed) not in known
    ]
    with console.progress(f"{len(todo)} students on {config.method}", len(todo) * updates, "updates") as advance:
        for task in todo:
            result = student.train(
                config, task, distilled, teacher, validation, job, folder.path / "labels", advance, stop
            )
            record = Record(
                kind="student",
                run=config.name,
                dataset=config.data.source,
                classes=len(dataset.classes),
                resolution=config.data.resolution,
                method=config.method,
                ipc=config.ipc,
                network=task.network,
                regime=task.regime,
                distillation_seed=config.seed,
                student_seed=task.seed,
                evaluated_on=validation.on,
                metrics=result.metrics,
                recipe=recipe,
                protocol=protocol,
                config=config.fingerprint(),
                artefact=distilled.sha256,
                cost={"seconds": round(result.seconds, 3), "updates": result.updates},
                provenance=provenance(config.compute),
            )
            name = f"student-{task.network.replace(':', '-')}-{task.regime}-{task.seed:03d}-{protocol[:8]}.jsonl"
            write_records(folder.path / "records" / name, [record])


def _recipe(config: Config, teacher: Teacher, updates: int) -> dict[str, object]:
    """Return all that two students must have in common to be compared."""
    settings = config.student.model_dump(mode="json", exclude={"networks", "seeds", "baselines"})
    labels = config.labels.model_dump(mode="json", exclude={"regimes"})
    return {
        **settings,
        **labels,
        "updates": updates,
        "optimizer": "adamw",
        "checkpoint": "last",
        "teacher": teacher.sha256,
        "threads": config.compute.threads,
        "precision": config.compute.precision,
    }
