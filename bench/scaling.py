"""``wmdd bench scaling``: synthesis over more and more ranks, and where their time goes."""

import os
import statistics
import time
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
from wmdd.launchers import Launcher, Local
from wmdd.records import files, provenance
from wmdd.records.schema import SpeedRecord
from wmdd.runtime.progress_bars import progress
from wmdd.storage.files import read_json, write_bytes

Mode = Literal["strong", "weak"]

PHASES = ("startup", "statistics", "preparation", "warmup", "synthesis")
"""Where the time of a rank goes, in order; ``waiting`` is the part of ``synthesis`` that it spends on the others."""


@dataclass(frozen=True)
class Size:
    """One number of ranks, and the groups that they share."""

    ranks: int
    groups: int

    @property
    def balance(self) -> float:
        """The efficiency that the dealing of whole groups allows: the rank with most groups decides."""
        return self.groups / (self.ranks * -(-self.groups // self.ranks))


@dataclass(frozen=True)
class Point:
    """What all ranks of one job measured."""

    work: int
    """Images × iterations"""
    phases: dict[str, float]
    """Seconds of each phase on its slowest rank, and ``waiting`` on average"""
    images: dict[str, str]
    """SHA-256 of each group's images"""
    precision: str
    device: str

    @property
    def rate(self) -> float:
        """img·iter/s of all ranks together, from the first one's start to the last one's end."""
        return self.work / self.phases["synthesis"]


def numbers_of(text: str) -> list[int]:
    """Return the numbers of ranks that ``1,2,4`` names.

    Raises:
        InputError: it names none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f"--ranks {text}: expected numbers from 1, such as 1,2,4")
    return [int(part) for part in parts]


def mode_of(text: str) -> Mode:
    """Return the mode of that name.

    Raises:
        InputError: there is none.
    """
    if text not in ("strong", "weak"):
        raise InputError(f"--mode {text}: expected strong or weak")
    return "strong" if text == "strong" else "weak"


def sizes(ranks: Sequence[int], groups: int, mode: Mode, team: int = 1) -> list[Size]:
    """Return the jobs of a study.

    Args:
        ranks: numbers of ranks.
        groups: that the run has.
        mode: ``strong``: all groups on every number of ranks; ``weak``: as many for each rank.
        team: ranks that work on one group together.

    Raises:
        InputError: a number of ranks is no multiple of the team, or some ranks would have no group.
    """
    chosen = sorted(set(ranks))
    if uneven := [size for size in chosen if size % team]:
        raise InputError(f"--ranks {uneven[0]}: no multiple of synthesis.split_class = {team}")
    most = chosen[-1] // team
    if groups < most:
        raise InputError(
            f"--ranks {chosen[-1]}: the run has {groups} groups, so {most - groups} ranks would have none; take fewer"
            " ranks, or smaller groups (synthesis.classes_per_group)"
        )
    return [Size(size, groups if mode == "strong" else groups // most * (size // team)) for size in chosen]


def run(
    config: Config,
    ranks: Sequence[int],
    mode: Mode,
    repeats: int = 3,
    launcher: Launcher | None = None,
    folder: Path | None = None,
) -> list[SpeedRecord]:
    """Measure synthesis on each number of ranks, in turns.

    Every repeat is a job of its own, with all it takes to start.  Threads per rank are the config's for every size.

    Args:
        config: what is synthesised; ``synthesis.iterations`` decides how long it takes.
        ranks: numbers of ranks.
        mode: strong or weak.
        repeats: of each size.
        launcher: starts the jobs; on this machine by default.
        folder: where jobs find their config and leave what they measured, on a disk that the launcher's nodes share; a
            temporary one by default.

    Returns:
        one record of each size, in order.

    Raises:
        InputError: config, data or ranks are wrong; nothing was started.
        WmddError: a job failed; the message has its last words.
    """
    dataset = load_dataset(config.data, config.compute.workers)
    method = blocks.check(config, dataset)
    if method.objective() is None:
        raise InputError(f"method = {config.method!r} optimises no images: there is no synthesis to time")
    groups = groups_of(config, len(dataset.classes))
    study = sizes(ranks, len(groups), mode, config.synthesis.split_class)
    points: dict[Size, list[Point]] = {size: [] for size in study}
    iterations = method.synthesis().iterations
    work = nullcontext(folder) if folder else TemporaryDirectory(prefix="wmdd-scaling-")
    with work as place, progress("scaling", repeats * len(study), "jobs") as tell:
        config_file = Path(place).absolute() / "config.toml"
        write_bytes(config_file, to_toml(config).encode())
        for repeat in range(repeats):
            for size in study:
                told = config_file.with_name(f"{size.ranks}-{repeat}")
                told.mkdir(exist_ok=True)
                arguments = [str(config_file), str(told), "--groups", str(size.groups)]
                if launcher is None:  # elsewhere a job waits for its turn, which is no time of its own
                    arguments += ["--launched", str(time.time())]
                (launcher or Local()).job(size.ranks, "bench.scaling_worker", arguments, told)
                classes = sum(len(group.classes) for group in groups[: size.groups])
                points[size].append(collect(told, size, classes * config.ipc * iterations))
                tell(1)
    return [_record(config, mode, size, points, groups_of_one=len(groups[0].classes)) for size in study]


def collect(folder: Path, size: Size, work: int) -> Point:
    """Return what the ranks of one job wrote.

    Raises:
        WmddError: a rank wrote nothing.
    """
    told = [read_json(folder / f"rank-{rank:05d}.json") for rank in range(size.ranks)]
    phases = {phase: max(rank[phase] for rank in told) for phase in PHASES}
    phases["waiting"] = statistics.mean(rank["synthesis"] - rank["own"] for rank in told)
    images = {group: sha for rank in told for group, sha in rank["images"].items()}
    return Point(work, phases, images, told[0]["precision"], told[0]["device"].partition(":")[0])


def efficiency(points: Sequence[Point], ranks: int, base: Sequence[Point], base_ranks: int) -> dict[str, float]:
    """Return the rate of each rank relative to that of the smallest job, over the pairs of repeats."""
    return spread(
        [own.rate / ranks / (one.rate / base_ranks) for own, one in zip(points, base, strict=True)], "efficiency"
    )


def _record(config: Config, mode: Mode, size: Size, points: dict[Size, list[Point]], groups_of_one: int) -> SpeedRecord:
    own, base = points[size], next(iter(points))
    phases = {name: statistics.median(point.phases[name] for point in own) for name in own[0].phases}
    everything = [sum(point.phases[name] for name in PHASES) for point in own]
    team = config.synthesis.split_class
    metrics = spread([point.rate for point in own], "rate")
    metrics |= efficiency(own, size.ranks, points[base], base.ranks)
    metrics |= {"repeats": float(len(own)), "seconds": phases["synthesis"], "total": statistics.median(everything)}
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
        provenance=provenance.provenance(config.compute) | {"world_size": size.ranks, "cpus": os.cpu_count()},
    )


def same_images(jobs: Sequence[dict[str, str]]) -> bool:
    """Return whether all jobs that synthesised a group ended in the same images of it."""
    known: dict[str, str] = {}
    return all(known.setdefault(group, sha) == sha for job in jobs for group, sha in job.items())


def tell(found: Sequence[SpeedRecord], out: Path | None, console: Console) -> None:
    """Add the records to a file, if one is named, and print them."""
    if out:
        for record in found:
            files.append(out, record)
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
        (str(record.ranks), *(f"{record.metrics[phase]:.1f}" for phase in (*PHASES, "waiting", "total")))
        for record in found
    ]
    console.print(_table("Where the time goes, seconds", ("Ranks", *PHASES, "(waiting)", "total"), times))
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
    """Return what must be known to read the table."""
    first, last = found[0], found[-1]
    setup: dict[str, Any] = first.setup
    lines = [
        f"{first.provenance['cpu'] if setup['device'] == 'cpu' else first.provenance['device']},"
        f" {setup['threads']} thread(s) a rank, {setup['precision']}, {first.dataset}, {first.network},"
        f" {first.resolution} px, {setup['iterations']} iterations; median [least, largest] of"
        f" {first.metrics['repeats']:.0f} repeats in turns",
        "Efficiency: rate per rank relative to the fewest ranks; Bound: what dealing whole groups allows",
        "waiting: the part of the synthesis that a rank spends on the others, on average",
    ]
    cpus = first.provenance["cpus"]
    if setup["device"] == "cpu" and last.ranks * setup["threads"] > cpus:
        lines.append(
            f"{last.ranks} ranks × {setup['threads']} thread(s) share {cpus} CPUs: they cannot all run at once"
        )
    same = "the same" if first.metrics["same_images"] else "NOT the same"
    lines.append(f"Images: {same} in every job that synthesised a group, bit for bit")
    return lines
