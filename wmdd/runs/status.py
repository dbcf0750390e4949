"""``wmdd status``: finished parts and active processes of a run, read from the run folder, without torch."""

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmdd.runs import progress
from wmdd.runs.folder import RunFolder
from wmdd.storage.files import read_json

if TYPE_CHECKING:
    from rich.console import Console

_STALE_AFTER_SECONDS = 60.0
_STALE_AFTER_REPORTS = 3
"""A process without a report for both of these times has probably ended."""


def show(run: Path, console: "Console") -> None:
    """Print stages and processes of a run.

    Raises:
        InputError: the folder contains no run.
    """
    from rich.table import Table

    RunFolder(run).bound()
    table = Table("", "teacher", "blocks", "students", box=None, pad_edge=False)
    for folder in [RunFolder(run), *map(RunFolder, sorted((run / "baselines").glob("*")))]:
        if (folder.path / "config.json").exists():
            table.add_row(*_line(run, folder))
    console.print(table)
    for report in progress.read(RunFolder(run)):
        console.print(_sentence(report), markup=False, soft_wrap=True)
    page = run / "report.html"
    console.print(f"report: {page}" if page.exists() else "report: not yet", markup=False, soft_wrap=True)


def _line(run: Path, folder: RunFolder) -> tuple[str, ...]:
    config: dict[str, Any] = folder.bound()["config"]
    # One directory listing each. A run may have thousands of tasks, so no file is opened for each of them.
    blocks = sum(1 for _ in (folder.path / "blocks").glob("*.json"))
    students = sum(1 for _ in (folder.path / "records").glob("student-*.jsonl"))
    settings, regimes = config["student"], config["labels"]["regimes"]
    expected = len(settings["networks"]) * settings["seeds"] * len(regimes) * len(settings["views"])
    teacher = folder.path / "teacher.json"
    found = f"{read_json(teacher)['top1']:.1%}" if teacher.exists() else "not yet"
    name = str(run) if folder.path == run else f"  {folder.path.name}"
    return name, found, f"{blocks} / {config['blocks']}", f"{students} / {expected}"


def _sentence(report: progress.ProcessState) -> str:
    if report.message:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - report.age))
        return f"{report.stage} ({report.process}, {when}): {report.message}"
    done = f"{report.stage}: {report.done:,} of {report.total:,} {report.unit}"
    if report.rate and report.left is not None:
        done += f", {report.rate:,.1f} per second, {timedelta(seconds=round(report.left))} left"
    silent = (
        f"; no report for {timedelta(seconds=round(report.age))}: has probably ended"
        if report.age > max(_STALE_AFTER_SECONDS, _STALE_AFTER_REPORTS * report.interval)
        else ""
    )
    return f"{done} ({report.process}){silent}"
