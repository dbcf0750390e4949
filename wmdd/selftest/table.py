"""The rows of ``wmdd selftest`` in their order, and how verdicts are shown and written."""

import math
from functools import partial
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from wmdd.config.schema import ComputeConfig
from wmdd.records.provenance import provenance
from wmdd.selftest import losses, many_ranks, runs, speeds
from wmdd.selftest.rows import Check, Machine, Need, Precision, RowResult
from wmdd.storage.files import FORMAT

_EAGER: tuple[tuple[Precision, tuple[Need, ...]], ...] = (("fp32", ()), ("tf32", ("tf32",)), ("bf16", ("bf16",)))
_COMPILED: tuple[tuple[Precision, tuple[Need, ...]], ...] = (
    ("fp32", ("full", "compiler")),
    ("bf16", ("full", "cuda", "bf16", "compiler")),
)
_RANKS: tuple[tuple[many_ranks.Kind, str, tuple[Need, ...]], ...] = (
    ("cpu", "CPU ranks, gloo", ()),
    ("cuda", "GPU ranks, NCCL", ("cuda", "gpus")),
)
_OF_RANKS = {
    "placement": many_ranks.placement,
    "all-reduce": many_ranks.all_reduce,
    "same bytes": many_ranks.same_bytes,
    "DDP teacher and student": many_ranks.parallel,
    "split_class": many_ranks.split,
}
_MARKS = {"pass": "[green]pass[/]", "fail": "[red]fail[/]", "not available": "[yellow]not available[/]"}


def rows() -> list[Check]:
    """Return all rows, in the order in which they are done."""
    return [
        Check("device", speeds.devices),
        *(Check(f"loss and gradient, {one}", partial(losses.compare, precision=one), needs) for one, needs in _EAGER),
        *(
            Check(f"loss and gradient, {one}, compiled", partial(losses.compare, precision=one, compiled=True), needs)
            for one, needs in _COMPILED
        ),
        *(Check(f"run, {one}", partial(runs.whole_run, precision=one), needs) for one, needs in _EAGER),
        *(
            Check(f"run, {one}, compiled", partial(runs.whole_run, precision=one, compiled=True), needs)
            for one, needs in _COMPILED
        ),
        Check("report", runs.report, ("full",)),
        Check("same run twice", runs.repeated),
        Check("stop, kill and resume", runs.resumed),
        Check("out of memory", runs.out_of_memory),
        Check("runs at the same time (--jobs)", runs.several_jobs, ("full",)),
        *(
            Check(f"{title}: {name}", partial(work, kind=kind), needs)
            for kind, title, needs in _RANKS
            for name, work in _OF_RANKS.items()
        ),
        *(
            Check(f"speed: matrix product, {one}", partial(speeds.product, precision=one), needs)
            for one, needs in _EAGER
        ),
        Check("speed: memory copy", speeds.copy),
        Check("speed: copy to the device", speeds.upload, ("cuda",)),
        Check("speed: launch", speeds.launch),
        Check("speed: decode", speeds.decode),
        Check("speed: disk", speeds.disk),
    ]


def passed(found: dict[str, RowResult]) -> bool:
    """Return whether no row failed."""
    return all(one.state != "fail" for one in found.values())


def table(found: dict[str, RowResult]) -> Table:
    """Return the verdicts as a table for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("Row", "Verdict", "Seconds", "Detail"):
        shown.add_column(column, justify="right" if column == "Seconds" else "left")
    for name, one in found.items():
        shown.add_row(Text(name), _MARKS[one.state], f"{one.seconds:.1f}" if one.seconds else "", Text(one.detail))
    return shown


def summary(found: dict[str, RowResult], seconds: float) -> str:
    """Return one line: the number of rows by verdict, and the names of the rows that failed."""
    states = [one.state for one in found.values()]
    counts = (
        f"{states.count('pass')} passed, {states.count('fail')} failed, {states.count('not available')} not available"
    )
    failed = ", ".join(name for name, one in found.items() if one.state == "fail")
    return f"{counts} in {seconds:.0f} s" + (f"; failed: {failed}" if failed else "")


def as_json(found: dict[str, RowResult], machine: Machine, quick: bool, seconds: float) -> dict[str, Any]:
    """Return verdicts, tolerances and the description of the system as plain values, for a bug report."""
    return {
        "format": FORMAT,
        "passed": passed(found),
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": vars(machine),
        "provenance": provenance(ComputeConfig(device=machine.device)),
        "tolerances": {
            "float64": {name: vars(one) for name, one in losses.TOLERANCES.items()},
            "finite_differences": losses.FINITE_DIFFERENCE_TOLERANCE,
            "runs": runs.RUN_TOLERANCES,
            "ddp": many_ranks.PARALLEL_TOLERANCE,
            "split_class": many_ranks.SPLIT_TOLERANCE,
            "least_share_of_data_sheet": speeds.LEAST_SHARE,
        },
        "rows": [{"name": name, **vars(one), "figures": _finite(one.figures)} for name, one in found.items()],
    }


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Return the figures with None for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
