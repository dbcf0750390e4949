"""``wmdd bench plan``: GPU-hours and wall time of a whole run, from measured speeds or from rooflines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.dry_steps import precision_of
from bench.roofline import Plan
from bench.throughput import number
from bench.workloads import groups_of
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.data.synthetic import name_of
from wmdd.distill.methods import registry
from wmdd.errors import InputError
from wmdd.records import files
from wmdd.records.schema import SpeedRecord
from wmdd.runs.baselines import baselines_of
from wmdd.students.tasks import student_tasks, update_count

PUBLISHED = {
    "digits": (10, 1_442),
    "cifar10": (10, 50_000),
    "imagenette": (10, 9_469),
    "tiny-imagenet": (200, 100_000),
    "imagenet-1k": (1000, 1_281_167),
}
"""Source -> classes and training images of the whole dataset: a run can be planned without its images."""


ROOFLINE = "roofline"
"""Engine of a record that was predicted."""


@dataclass(frozen=True)
class Component:
    """One part of a run, projected."""

    title: str
    work: float
    unit: str
    """Unit of the work"""
    record: SpeedRecord
    """Measurement that the projection uses"""
    gpu_hours: float
    wall_hours: float
    """Hours of the GPU with most work: groups and students are not split"""

    @property
    def spread(self) -> tuple[float, float]:
        """Hours at the fastest and at the slowest measured repeat, as factors of those at the median."""
        metrics = self.record.metrics
        return tuple(metrics["rate"] / metrics.get(key, metrics["rate"]) for key in ("rate_high", "rate_low"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Need:
    """Requirements on the record that a component uses."""

    stage: str
    network: str
    setup: dict[str, Any]
    """Keys of the setup with their required values"""


def run(
    config: Config, gpus: int, measured: Sequence[SpeedRecord], source: Path, plan: Plan | None = None
) -> tuple[list[Component], list[str]]:
    """Project a run.

    Args:
        config: config of the run.
        gpus: number of GPUs that share the run.
        measured: measured speeds of one GPU.
        source: file of the speeds, for messages.
        plan: prediction for the GPU, which replaces missing measurements; None: a missing measurement is an error.

    Returns:
        The components of the run, and the assumptions.

    Raises:
        InputError: a component has no fitting record. The message contains the command that measures it.
    """
    method = registry.create(config)
    classes, images = size_of(config)
    groups = [len(group.classes) for group in groups_of(config, classes)]
    parts: list[Component] = []

    def measure(need: Need) -> SpeedRecord:
        try:
            return find(config, need, measured, source)
        except InputError:
            if plan is None:
                raise
        return predicted(config, need, plan, classes * config.ipc)

    def dealt(title: str, unit: str, pieces: Sequence[float], record: SpeedRecord, per_hour: float) -> None:
        # A run deals its pieces in the same way: every gpus-th piece to the same GPU.
        most = max(sum(pieces[first::gpus]) for first in range(min(gpus, len(pieces))))
        work = sum(pieces)
        parts.append(Component(title, work, unit, record, work / per_hour, most / per_hour))

    if method.uses_statistics:
        record = measure(Need("statistics", config.teacher.network, {"precision": precision_of(config)}))
        shares = [count * images / classes for count in groups]
        dealt("decode + statistics", "images", shares, record, 3600 * record.metrics["rate"])
    objective = method.objective()
    if objective is not None:
        if objective.feature:
            chosen = config.barycenter
            solver = {"ipc": config.ipc, "weights": chosen.weights, "starts": chosen.starts}
            need = Need("barycenters", config.teacher.network, solver)
            if plan is None or any_fits(config, need, measured, source):
                record = measure(need)
                dealt("barycenters", "classes", groups, record, 3600 * record.metrics["rate"])
        iterations = method.synthesis().iterations
        keys = {"precision": precision_of(config), "compile": config.compute.compile, "batch": groups[0] * config.ipc}
        record = measure(Need("synthesis", config.teacher.network, keys))
        work = [float(count * config.ipc * iterations) for count in groups]
        dealt("synthesis", "img·iter", work, record, 3600 * record.metrics["rate"])
    distilled = classes * config.ipc
    for name in config.student.networks:
        runs = [config, *baselines_of(config).values()]
        students = [one.student.replace({"networks": (name,)}) for one in runs]
        tasks = [task for one in students for task in student_tasks(one, config.labels.regimes)]
        batch = min(config.student.batch_size, distilled)
        record = measure(Need("students", name, {"precision": precision_of(config), "batch": batch}))
        updates = [float(update_count(config, task.view, distilled)) for task in tasks]
        per_hour = record.metrics["rate"] * float(record.setup["updates"])
        dealt(f"{len(tasks)} students ({name})", "updates", updates, record, per_hour)
    places = {_place(part.record): part.record.stage for part in parts if part.record.engine != ROOFLINE}
    if len(places) > 1:
        told = ", ".join(f"{stage} on {place}" for place, stage in places.items())
        raise InputError(f"{source}: mixes devices ({told}): measure every stage on the one that the run will use")
    return parts, assumptions(config, gpus, parts, images, classes)


def predicted(config: Config, need: Need, plan: Plan, images: int) -> SpeedRecord:
    """Return the largest possible speed of a stage in the form of a record.

    Args:
        config: config of the run.
        need: stage and network.
        plan: prediction for the GPU.
        images: number of images in the distilled set.

    Raises:
        InputError: the plan has no step of this stage.
    """
    rate = plan.rate(need.stage, need.network)
    if rate is None:
        raise InputError(f"{need.stage} of {need.network}: there is no prediction, and no measurement")
    setup: dict[str, Any] = {}
    unit = {"statistics": "img/s", "synthesis": "img·iter/s", "students": "updates/h"}[need.stage]
    if need.stage == "students":
        setup = {"updates": 1}
        rate *= 3600 / min(config.student.batch_size, images)
    return SpeedRecord(
        kind="throughput",
        stage=need.stage,
        engine=ROOFLINE,
        dataset=config.name,
        network=need.network,
        resolution=config.data.resolution,
        unit=unit,
        metrics={"rate": rate},
        setup=setup,
        provenance={"device": f"{plan.gpu.name}, roofline"},
    )


def any_fits(config: Config, need: Need, measured: Sequence[SpeedRecord], source: Path) -> bool:
    """Return whether a measurement fits."""
    try:
        find(config, need, measured, source)
    except InputError:
        return False
    return True


def _place(record: SpeedRecord) -> str:
    device = str(record.provenance.get("device"))
    return str(record.provenance.get("cpu") or device) if device == "cpu" else device


def size_of(config: Config) -> tuple[int, int]:
    """Return the number of classes and of training images of a run.

    Raises:
        InputError: the numbers depend on the images, and these are missing.
    """
    data = config.data
    if data.source in PUBLISHED and name_of(data) != "synthetic":
        classes, images = PUBLISHED[data.source]
        if data.classes is None:
            return classes, images - classes * data.holdout_per_class
        if isinstance(data.classes, int) and data.classes <= classes:
            return data.classes, round(images * data.classes / classes) - data.classes * data.holdout_per_class
    dataset = load_dataset(data, config.compute.workers)
    return len(dataset.classes), len(dataset.train)


def find(config: Config, need: Need, measured: Sequence[SpeedRecord], source: Path) -> SpeedRecord:
    """Return the latest fitting record of this package's engine.

    Raises:
        InputError: no record fits. The message names the first unmet requirement and the command to measure it.
    """
    fits: list[tuple[str, Callable[[SpeedRecord], bool]]] = [
        (f"stage {need.stage}", lambda one: one.kind == "throughput" and one.stage == need.stage),
        ("engine wmdd", lambda one: one.engine == "wmdd"),
        (f"network {need.network}", lambda one: one.network == need.network),
        (f"{config.data.resolution} px", lambda one: one.resolution == config.data.resolution),
        *((f"{key} {value}", _has(key, value)) for key, value in need.setup.items()),
    ]
    left = list(measured)
    for wish, test in fits:
        before, left = left, [one for one in left if test(one)]
        if not left:
            reason = f"{source} has no record of {need.stage}" + (f" with {wish}" if before != list(measured) else "")
            command = f"wmdd bench throughput CONFIG --stage {need.stage} --out {source}"
            raise InputError(f"{reason}: measure it with `{command}`, with the keys of this run")
    return max(left, key=lambda one: one.time)


def _has(key: str, value: Any) -> Callable[[SpeedRecord], bool]:
    return lambda one: bool(one.setup.get(key) == value)


def assumptions(config: Config, gpus: int, parts: Sequence[Component], images: int, classes: int) -> list[str]:
    """Return the assumptions of the projection, one sentence each."""
    hardware = sorted({str(part.record.provenance.get("device")) for part in parts})
    sets = sorted({part.record.dataset for part in parts})
    notes = [
        f"every GPU is as fast as the measured one ({', '.join(hardware)}; images: {', '.join(sets)}), and none waits"
        " for another",
        f"{images:,} training images in {classes:,} classes of equal size; each GPU has as many CPU cores for decoding"
        " as the measured one, and storage is not slowed down by the other GPUs",
        f"{gpus} GPUs share whole groups and whole students; the GPU with most work decides the wall time",
        "the components run one after the other; a real run overlaps decoding and synthesis",
        "students train at the same speed under every label regime; the measured one is soft, if the run has it",
        "ranges are those of the measured repeats; other machines and data differ by more",
        "not counted: training the teacher, start-up, queues, validation of students, distilling the baselines",
    ]
    if any(part.record.engine == ROOFLINE for part in parts):
        notes.append(
            "rates with ≤ are rooflines: their hours are the least possible; barycenters without a measurement,"
            " and decoding, are not counted"
        )
    if config.data.source == "imagenet-1k" and any(part.record.dataset == "synthetic" for part in parts):
        notes.append("generated images decode as fast as photographs")
    return notes


def tell(config: Config, gpus: int, parts: Sequence[Component], notes: Sequence[str], console: Console) -> None:
    """Print a projection with its assumptions."""
    cpu = any(part.record.provenance.get("device") == "cpu" for part in parts)
    devices = "CPU processes" if cpu else "GPUs"
    title = f"PROJECTION, not a measurement: {config.name}, IPC {config.ipc}, on {gpus} {devices}"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    shown.add_column("Component")
    for column in ("Work", "Rate", "Process-hours" if cpu else "GPU-hours", "Wall time"):
        shown.add_column(column, justify="right")
    for part in parts:
        shown.add_row(
            part.title,
            f"{_large(part.work)} {part.unit}",
            f"{'≤ ' * (part.record.engine == ROOFLINE)}{number(part.record.metrics['rate'])} {part.record.unit}",
            _ranged(part.gpu_hours, part.spread, "{:,.3g}".format),
            _ranged(part.wall_hours, part.spread, clock),
        )
    shown.add_section()
    sums = []
    for kind, show in (("gpu_hours", "{:,.3g}".format), ("wall_hours", clock)):
        total = sum(getattr(part, kind) for part in parts)
        ends = [sum(getattr(part, kind) * part.spread[end] for part in parts) for end in (0, 1)]
        sums.append(_ranged(total, (ends[0] / total, ends[1] / total) if total else (1.0, 1.0), show))
    shown.add_row("all", "", "", *sums)
    console.print(shown)
    console.print("Assumptions:", highlight=False)
    for line in notes:
        console.print(f"- {line}", soft_wrap=True, markup=False, highlight=False)


def _ranged(hours: float, spread: tuple[float, float], show: Callable[[float], str]) -> str:
    """Return hours with those at the fastest and at the slowest repeat, where repeats differ."""
    middle, ends = show(hours), [show(hours * factor) for factor in spread]
    return middle if ends == [middle, middle] else escape(f"{middle} [{ends[0]}, {ends[1]}]")


def _large(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def clock(hours: float) -> str:
    """Return hours as ``2 h 05 min``, ``5 min 10 s`` or ``3.1 s``, rounded up to what is shown."""
    seconds = hours * 3600
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        whole = math.ceil(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def read(path: Path) -> list[SpeedRecord]:
    """Return the speeds of a file of records.

    Raises:
        InputError: the file does not exist, or a line of it cannot be read.
    """
    found, problems = files.read_records(path, SpeedRecord)
    if problems:
        raise InputError(f"{problems[0]}; fix or delete the line")
    return found
