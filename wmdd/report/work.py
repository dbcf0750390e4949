"""What a protocol has done and still has to do, as a grid of its runs."""

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.report.runs import Run
from wmdd.runs import progress
from wmdd.runs.folder import RunFolder

if TYPE_CHECKING:
    from wmdd.report.collect import Report

STATES = ("done", "running", "requeued", "failed", "partial", "missing")
"""``requeued``: SLURM has started it again, or a stop request ended it and it waits. ``partial``: begun, and no process
works on it."""
_SILENT_SECONDS = 300.0
"""Seconds without a report after which a process no longer counts as running."""
FEWEST = 2
"""Runs below which a grid says no more than the table."""


@dataclass(frozen=True)
class WorkCell:
    """One run of a protocol."""

    state: str
    text: str
    """Time that it took, or how far it is."""
    title: str


@dataclass(frozen=True)
class WorkGrid:
    """The runs of a report by method and seed."""

    states: list[str]
    grids: list[tuple[str, list[str], list[tuple[str, list[WorkCell | None]]]]]
    """(title, columns, (method, cells))."""


def work(report: "Report") -> WorkGrid | None:
    """Return the grid of runs; None where there are fewer than ``FEWEST`` runs with a seed."""
    rows = [row for row in report.coverage.to_dict("records") if not pd.isna(row["seed"])]
    if len(rows) < FEWEST:
        return None
    runs = {run.label: run for run in report.runs}
    seconds = dict(zip(report.cost["run"], report.cost["total"], strict=True))
    cells: dict[Any, dict[str, dict[int, list[WorkCell]]]] = {}
    for row in rows:
        run = runs.get(row["run"])
        ipc, name = _place(row, run)
        cell = _cell(row, run, seconds.get(row["run"]))
        cells.setdefault(ipc, {}).setdefault(name, {}).setdefault(int(row["seed"]), []).append(cell)
    grids = []
    for ipc, methods in sorted(cells.items(), key=lambda item: (item[0] is None, item[0] or 0)):
        seeds = sorted({seed for own in methods.values() for seed in own})
        lines = [(name, [_joined(own.get(seed, [])) for seed in seeds]) for name, own in methods.items()]
        grids.append((f"IPC {ipc}" if ipc else "", [f"seed {seed}" for seed in seeds], lines))
    met = Counter(cell.state for _, _, lines in grids for _, own in lines for cell in own if cell)
    return WorkGrid([state for state in STATES if met[state]], grids)


def _place(row: dict[str, Any], run: Run | None) -> tuple[int | None, str]:
    if run is None:
        found = next((part for part in str(row["run"]).split("/") if part.startswith("ipc-")), "")
        number = found.removeprefix("ipc-")
        return int(number) if number.isdecimal() else None, str(row["method"])
    method = run.method if run.baseline or run.name in ("", run.method) else f"{run.method} ({run.name})"
    return run.config.get("ipc"), method


def _cell(row: dict[str, Any], run: Run | None, seconds: float | None) -> WorkCell:
    took = str(timedelta(seconds=round(seconds))) if seconds and not pd.isna(seconds) else ""
    if row["missing"] == "":
        return WorkCell("done", took or "done", f"{row['run']}: done{f' in {took}' if took else ''}{_restarts(run)}")
    if run is None or row["missing"] == "all":
        return WorkCell("missing", "–", f"{row['run']}: not begun")
    parts = [(row[key], row[f"{key}_expected"]) for key in ("blocks", "students")]
    done, expected = (sum(int(pair[side] or 0) for pair in parts) for side in (0, 1))
    share = f"{100 * done // max(1, expected)} %"
    for process in progress.read(RunFolder(run.folder)):
        state = {"failed": "failed", "interrupted": "requeued"}.get(process.stage)
        state = state or ("running" if process.age < _SILENT_SECONDS else None)
        if state:
            why = process.message or f"{process.stage}, {process.done:,} of {process.total:,} {process.unit}"
            return WorkCell(state, share, f"{row['run']}: {state}; {why} ({process.process}){_restarts(run)}")
    return WorkCell("partial", share, f"{row['run']}: {share}; missing: {row['missing']}{_restarts(run)}")


def _restarts(run: Run | None) -> str:
    """Return how often SLURM started the work of a run again, where it did."""
    if run is None:
        return ""
    slurm = [record.provenance.get("slurm") or {} for record in run.records]
    slurm += [(sidecar.get("provenance") or {}).get("slurm") or {} for sidecar in run.blocks.values()]
    most = max((int(one.get("restarts") or 0) for one in slurm), default=0)
    jobs = ", ".join(sorted({str(one["job"]) for one in slurm if one.get("job")}))
    return (f"; job {jobs}" if jobs else "") + (f", restarted {most} times" if most else "")


def _joined(cells: list[WorkCell]) -> WorkCell | None:
    """Return one cell for runs of the same place: the one that needs attention most."""
    return max(cells, key=lambda cell: STATES.index(cell.state), default=None)
