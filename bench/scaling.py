"""``wmdd bench scaling``: speed of the synthesis on several numbers of ranks, and the time of each phase."""

import itertools
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from bench.throughput import spread_text
from bench.timing import spread
from bench.workloads import groups_of
from wmdd.config.loading import to_toml
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.data.synthetic import name_of
from wmdd.distill import blocks
from wmdd.errors import InputError
from wmdd.launchers import Launcher, Local, Step
from wmdd.records import files
from wmdd.records.schema import SpeedRecord
from wmdd.storage.files import read_json, write_bytes

Mode = Literal["strong", "weak"]

PHASES = ("startup", "statistics", "preparation", "warmup", "synthesis")
"""Phases of a rank's time, in order. ``waiting`` is the part of ``synthesis`` in which a rank waits for others."""


@dataclass(frozen=True)
class Size:
    """A number of ranks, and the number of groups that they share."""

    ranks: int
    groups: int

    @property
    def balance(self) -> float:
        """Upper bound of the efficiency with whole groups: the rank with most groups decides."""
        return self.groups / (self.ranks * -(-self.groups // self.ranks))


@dataclass(frozen=True)
class Point:
    """Measurement of one step, by all its ranks."""

    work: int
    """Images × iterations"""
    phases: dict[str, float]
    """Seconds of each phase on its slowest rank, and mean seconds of ``waiting``"""
    images: dict[str, str]
    """SHA-256 of each group's images"""
    precision: str
    device: str
    provenance: dict[str, Any]
    """Provenance of rank 0, from its own node"""

    @property
    def rate(self) -> float:
        """img·iter/s of all ranks together, from the first start to the last end."""
        return self.work / self.phases["synthesis"]


def numbers_of(text: str) -> list[int]:
    """Return the numbers of ranks in a text such as ``1,2,4``.

    Raises:
        InputError: the text has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f"--ranks {text}: expected numbers from 1, such as 1,2,4")
    return [int(part) for part in parts]


def modes_of(text: str) -> tuple[Mode, ...]:
    """Return the modes of the text ``strong``, ``weak`` or ``both``.

    Raises:
        InputError: the text is another one.
    """
    known: dict[str, tuple[Mode, ...]] = {"strong": ("strong",), "weak": ("weak",), "both": ("strong", "weak")}
    if text not in known:
        raise InputError(f"--mode {text}: expected strong, weak or both")
    return known[text]


def sizes(ranks: Sequence[int], groups: int, mode: Mode, team: int = 1) -> list[Size]:
    """Return the sizes of a study.

    Args:
        ranks: numbers of ranks.
        groups: number of groups in the run.
        mode: ``strong``: all groups on every number of ranks; ``weak``: the same number of groups per rank.
        team: number of ranks that work on one group together.

    Raises:
        InputError: the team does not divide a number of ranks, or some ranks would have no group.
    """
    chosen = sorted(set(ranks))
    if uneven := [size for size in chosen if size % team]:
        raise InputError(f"--ranks {uneven[0]}: synthesis.split_class = {team} does not divide it")
    most = chosen[-1] // team
    if groups < most:
        raise InputError(
            f"--ranks {chosen[-1]}: the run has {groups} groups, so {most - groups} ranks would have none; use fewer"
            " ranks, or smaller groups (synthesis.classes_per_group)"
        )
    return [Size(size, groups if mode == "strong" else groups // most * (size // team)) for size in chosen]


def run(
    config: Config,
    ranks: Sequence[int],
    modes: Sequence[Mode],
    repeats: int = 3,
    launcher: Launcher | None = None,
    folder: Path | None = None,
) -> list[SpeedRecord]:
    """Measure the synthesis on each number of ranks, in turns, the largest first.

    Every repeat is a separate step, and includes the start of its processes. Threads per rank are the config's for
    every size.

    Args:
        config: config of the run; ``synthesis.iterations`` decides the duration of a step.
        ranks: numbers of ranks.
        modes: strong, weak or both.
        repeats: number of repeats of each size.
        launcher: starts the steps; on this machine by default.
        folder: folder of the steps' config and results, on a disk that the launcher's nodes share; a temporary folder
            by default. Steps that are finished there are not run again.

    Returns:
        One record for each size, in order, for each mode.

    Raises:
        InputError: config, dataset or ranks are wrong, or the folder contains a study of another config. No step was
            started.
        WmddError: a step failed. The message has its last line.
    """
    dataset = load_dataset(config.data, config.compute.workers)
    method = blocks.check(config, dataset)
    if method.objective() is None:
        raise InputError(f"method = {config.method!r} optimizes no images: there is no synthesis to time")
    groups = groups_of(config, len(dataset.classes))
    studies = {mode: sizes(ranks, len(groups), mode, config.synthesis.split_class) for mode in modes}
    work = nullcontext(folder) if folder else TemporaryDirectory(prefix="wmdd-scaling-")
    with work as name:
        place = Path(name).absolute()
        config_file = _config_file(config, place)
        steps: dict[tuple[Mode, Size, int], Step] = {}
        for repeat, mode in itertools.product(range(repeats), modes):
            for size in reversed(studies[mode]):
                own = place / f"{mode}-{size.ranks}-{repeat}"
                own.mkdir(exist_ok=True)
                arguments = (str(config_file), str(own), "--groups", str(size.groups))
                steps[mode, size, repeat] = Step(size.ranks, "bench.scaling_worker", arguments, own)
        (launcher or Local()).run_steps(list(steps.values()), place)
        found: list[SpeedRecord] = []
        for mode, study in studies.items():
            points: dict[Size, list[Point]] = {}
            for size in study:
                classes = sum(len(group.classes) for group in groups[: size.groups])
                done = classes * config.ipc * method.synthesis().iterations
                places = [steps[mode, size, repeat].folder for repeat in range(repeats)]
                points[size] = [collect(own, size, done) for own in places]
            found += [_record(config, mode, size, points, groups_of_one=len(groups[0].classes)) for size in study]
    return found


def _config_file(config: Config, folder: Path) -> Path:
    """Write the config that all steps of a study share, and return its file.

    Raises:
        InputError: the folder contains a study of another config.
    """
    file, content = folder / "config.toml", to_toml(config).encode()
    if file.exists() and file.read_bytes() != content:
        raise InputError(f"{folder}: holds a scaling study of another config; use another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)
    return file


def collect(folder: Path, size: Size, work: int) -> Point:
    """Return the measurement of one step, from the files of its ranks.

    Raises:
        WmddError: the file of a rank is missing.
    """
    reports = [read_json(folder / f"rank-{rank:05d}.json") for rank in range(size.ranks)]
    phases = {phase: max(rank[phase] for rank in reports) for phase in PHASES}
    phases["waiting"] = statistics.mean(rank["synthesis"] - rank["own"] for rank in reports)
    phases["decoded"] = max(rank["decoded"] for rank in reports)
    images = {group: sha for rank in reports for group, sha in rank["images"].items()}
    device, circumstances = reports[0]["device"].partition(":")[0], reports[0]["provenance"]
    return Point(work, phases, images, reports[0]["precision"], device, circumstances)


def efficiency(points: Sequence[Point], ranks: int, base: Sequence[Point], base_ranks: int) -> dict[str, float]:
    """Return the rate per rank relative to that of the smallest size, over the pairs of repeats."""
    return spread(
        [own.rate / ranks / (one.rate / base_ranks) for own, one in zip(points, base, strict=True)], "efficiency"
    )


def _record(config: Config, mode: Mode, size: Size, points: dict[Size, list[Point]], groups_of_one: int) -> SpeedRecord:
    own, base = points[size], next(iter(points))
    phases = {name: statistics.median(point.phases[name] for point in own) for name in own[0].phases}
    everything = [sum(point.phases[name] for name in PHASES) for point in own]
    without = [
        total - point.phases["statistics"] + point.phases["decoded"]
        for total, point in zip(everything, own, strict=True)
    ]
    team = config.synthesis.split_class
    metrics = spread([point.rate for point in own], "rate")
    metrics |= efficiency(own, size.ranks, points[base], base.ranks)
    metrics |= {"repeats": float(len(own)), "seconds": phases["synthesis"], "total": statistics.median(everything)}
    metrics["total_decoded"] = statistics.median(without)
    metrics |= phases | {"balance": Size(size.ranks // team, size.groups).balance}
    metrics["same_images"] = float(same_images([point.images for some in points.values() for point in some]))
    return SpeedRecord(
        kind="scaling",
        stage="synthesis",
        engine="wmdd",
        dataset=name_of(config.data),
        network=config.teacher.network,
        resolution=config.data.resolution,
        ranks=size.ranks,
        mode=mode,
        unit="img·iter/s",
        metrics=metrics,
        setup={
            "device": own[0].device,
            "precision": own[0].precision,
            "threads": config.compute.threads,
            "compile": config.compute.compile,
            "classes": groups_of_one,
            "ipc": config.ipc,
            "method": config.method,
            "groups": size.groups,
            "iterations": config.synthesis.iterations,
            "split_class": team,
        },
        provenance=own[0].provenance,
    )


def same_images(jobs: Sequence[dict[str, str]]) -> bool:
    """Return whether all steps that synthesized a group got the same images."""
    known: dict[str, str] = {}
    return all(known.setdefault(group, sha) == sha for job in jobs for group, sha in job.items())


def tell(found: Sequence[SpeedRecord], out: Path | None, console: Console) -> None:
    """Append the records to ``out``, if given, and print them, one mode after the other."""
    if out:
        for record in found:
            files.append(out, record)
    for mode in dict.fromkeys(record.mode for record in found):
        _print([record for record in found if record.mode == mode], console)


def _print(found: Sequence[SpeedRecord], console: Console) -> None:
    title = f"{str(found[0].mode).capitalize()} scaling of synthesis"
    columns = ("Ranks", "Groups", "img·iter/s", "Efficiency", "Bound")
    rows = [
        (
            str(record.ranks),
            str(record.setup["groups"]),
            spread_text(record.metrics, "rate"),
            spread_text(record.metrics, "efficiency"),
            f"{record.metrics['balance']:.2f}",
        )
        for record in found
    ]
    console.print(_table(title, columns, rows))
    times = [
        (str(record.ranks), *(f"{record.metrics[name]:.1f}" for name in (*PHASES, "waiting", "total", "total_decoded")))
        for record in found
    ]
    parts = ("Ranks", *PHASES, "(waiting)", "total", "decoded")
    console.print(_table("Where the time goes, seconds", parts, times))
    for line in footnotes(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def footnotes(found: Sequence[SpeedRecord]) -> list[str]:
    """Return the notes below the table: hardware, setup, meaning of the columns."""
    first, last = found[0], found[-1]
    setup: dict[str, Any] = first.setup
    lines = [
        f"{first.provenance['cpu'] if setup['device'] == 'cpu' else first.provenance['device']},"
        f" {setup['threads']} thread(s) per rank, {setup['precision']}, {first.dataset}, {first.network},"
        f" {first.resolution} px, {setup['iterations']} iterations; median [least, largest] of"
        f" {first.metrics['repeats']:.0f} repeats in turns",
        "Efficiency: rate per rank relative to the fewest ranks; Bound: largest efficiency with whole groups",
        "startup: from the start of the process, imports included; warmup: the first group up to its second iteration,"
        " on every rank; waiting: mean time that a rank waits for others"
        " during the synthesis; decoded: total if all images were decoded beforehand",
    ]
    cpus = first.provenance["cpus"]
    if nodes := last.provenance.get("nodes"):
        lines.append(f"Nodes of the largest size: {nodes}; smaller sizes ran on the first of them")
    if setup["device"] == "cpu" and not nodes and last.ranks * setup["threads"] > cpus:
        lines.append(
            f"{last.ranks} ranks × {setup['threads']} thread(s) share {cpus} CPUs: they cannot all run at once"
        )
    same = "the same" if first.metrics["same_images"] else "NOT the same"
    lines.append(f"Images: {same} in every step that synthesized a group, bit for bit")
    return lines
