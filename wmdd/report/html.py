"""The report as one HTML page that loads nothing: tables, plots, loss curves and images of the distilled sets."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

from wmdd.report import gallery, plots
from wmdd.report.accuracy_tables import headlines
from wmdd.report.collect import Report
from wmdd.report.collect_tables import tables
from wmdd.report.cost_tables import coverage_line
from wmdd.report.runs import Run
from wmdd.report.table import folded
from wmdd.report.text import MAX_HEADLINES, listed
from wmdd.storage.files import write_bytes

MAX_CURVES = 12
"""Groups whose loss curves the page shows."""
MAX_ORIGINS = 6
"""Origins that unfold below one number; all of them stand in the table of provenance."""

_CAPS = {
    "images": gallery.MAX_IMAGES,
    "classes": gallery.MAX_CLASSES,
    "pixels": gallery.MAX_PIXELS,
    "methods": gallery.MAX_METHODS,
    "origins": MAX_ORIGINS,
}


def write_html(report: Report, path: Path) -> None:
    """Write the report as one page that loads nothing: styles, plots and images are inside it.

    Raises:
        WmddError: the page cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["sha"] = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}").fullmatch
    template = environment.from_string((resources.files("wmdd.report") / "report.html.j2").read_text())
    problems = list(report.problems)
    times = sorted(f"{one.time:%Y-%m-%d}" for run in report.runs for one in (*run.records, *run.speeds))
    found = headlines(report)
    grids, total = gallery.grids(report.runs, problems)
    page = template.render(
        datasets=list(dict.fromkeys([*report.accuracy["dataset"]] or [speed.dataset for _, speed in report.speeds])),
        coverage=coverage_line(report),
        runs=len(report.runs),
        numbers=len(times),
        dates=list(dict.fromkeys(times[:1] + times[-1:])),
        headlines=found if len(found) <= MAX_HEADLINES else [],
        results=len(found),
        tables={table.id: folded(table) for table in tables(report)},
        figures=plots.figures(report),
        grids=grids,
        grids_total=total,
        curves=_curves(report.runs),
        series=range(plots.SERIES),
        caps=_CAPS,
        problems=listed(problems),
    )
    write_bytes(path, page.encode())


def _curves(runs: list[Run]) -> dict[str, Any]:
    """Return the loss curves of the first groups, and how many groups there are."""
    groups = [
        (f"{run.label}: {', '.join(map(str, group.get('classes', ())))}", group["curve"])
        for run in runs
        for group in run.groups
        if len((group.get("curve") or {}).get("iteration", ())) > 1
    ]
    return {"figure": plots.losses(groups[:MAX_CURVES]), "total": len(groups)}
