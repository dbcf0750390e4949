"""The report as one HTML page that loads nothing: tables, plots, loss curves and images of the distilled sets."""

import re
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from wmdd.report import gallery, plots
from wmdd.report.collect import Report
from wmdd.report.collect_tables import tables
from wmdd.report.cost_tables import coverage_line
from wmdd.report.families import TITLES, family
from wmdd.report.gaps import gaps
from wmdd.report.runs import Run
from wmdd.report.table import Table, folded
from wmdd.report.text import listed
from wmdd.report.verdict import Verdict, summary, verdicts
from wmdd.report.work import work
from wmdd.storage.files import write_bytes

MAX_CURVES = 12
"""Groups whose loss curves the page shows."""
MAX_ORIGINS = 6
"""Origins that unfold below one number; all of them stand in the table of provenance."""

_FOLDED = ("Coverage", "Cost", "Provenance")
"""Tables at the end, folded where they are long."""
_PAGE = resources.files("wmdd.report") / "page"

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

    loader = jinja2.PackageLoader("wmdd.report", "page")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["sha"] = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}").fullmatch
    environment.filters["share"] = lambda value: f"{100 * value:.2f}%"
    environment.filters["whole"] = _whole
    problems = list(report.problems)
    times = sorted(f"{one.time:%Y-%m-%d}" for run in report.runs for one in (*run.records, *run.speeds))
    grids, total = gallery.grids(report.runs, problems)
    made = [folded(table) for table in tables(report)]
    groups = _by_title([table for table in made if table.title not in _FOLDED])
    told = verdicts(report)
    found = {
        "verdicts": _by_section(told),
        "gaps": gaps(report),
        "groups": groups,
        "figures": plots.figures(report),
        "grids": grids,
        "curves": _curves(report.runs),
        "work": work(report),
        "folded_tables": [table for table in made if table.title in _FOLDED],
        "problems": listed(problems),
        "plots_after": next((name for name, _ in reversed(groups) if name in ("accuracy", "scaling")), ""),
    }
    page = environment.get_template("report.html.j2").render(
        **found,
        **{name: (_PAGE / file).read_text() for name, file in (("style", "style.css"), ("script", "script.js"))},
        contents=_contents(found),
        ids=dict(groups),
        summary=summary(told),
        datasets=list(dict.fromkeys([*report.accuracy["dataset"]] or [speed.dataset for _, speed in report.speeds])),
        coverage=coverage_line(report),
        runs=len(report.runs),
        numbers=len(times),
        dates=list(dict.fromkeys(times[:1] + times[-1:])),
        grids_total=total,
        caps=_CAPS,
        families=_families(report),
        version=metadata.version("wmdd"),
    )
    write_bytes(path, page.encode())


def _by_title(found: list[Table]) -> list[tuple[str, list[Table]]]:
    """Return the tables of each title, by the name of its anchor."""
    groups: dict[str, list[Table]] = {}
    for table in found:
        groups.setdefault(replace(table, section="").id, []).append(table)
    return list(groups.items())


def _by_section(found: list[Verdict]) -> list[list[Verdict]]:
    groups: dict[str, list[Verdict]] = {}
    for one in found:
        groups.setdefault(one.section.name, []).append(one)
    return list(groups.values())


def _families(report: Report) -> list[tuple[str, str]]:
    """Return the families of methods on the page, with their titles."""
    met = {family(method) for method in report.accuracy["method"] if method != "teacher"}
    return [(name, title) for name, title in TITLES.items() if name in met]


def _contents(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (anchor, title) of what the page has, in its order."""
    named = {"verdicts": ("verdict", "Verdict"), "gaps": ("never", "Never measured")}
    entries = [named[key] for key in named if found[key]]
    for name, own in found["groups"]:
        entries.append((name, own[0].title))
        if name == found["plots_after"] and found["figures"]:
            entries.append(("plots", "Plots"))
    entries += [("images", "Images")] if found["grids"] else []
    entries += [("curves", "Loss curves")] if found["curves"]["total"] else []
    entries += [("coverage", "Coverage")] if found["work"] else []
    for table in found["folded_tables"]:
        entries.append((table.id, table.title) if table.title != "Coverage" else ("missing", "Missing work"))
    return entries + ([("problems", "Notes")] if found["problems"] else [])


def _whole(text: str) -> str:
    """Return text whose intervals and p-values do not break across lines."""
    return re.sub(r" ± \S+(?: %)?| \[[^\]]*\]|\(p [^)]*\)", lambda found: found[0].replace(" ", "\u00a0"), text)


def _curves(runs: list[Run]) -> dict[str, Any]:
    """Return the loss curves of the first groups, and how many groups there are."""
    groups = [
        (f"{run.label}: {', '.join(map(str, group.get('classes', ())))}", group["curve"])
        for run in runs
        for group in run.groups
        if len((group.get("curve") or {}).get("iteration", ())) > 1
    ]
    return {"figure": plots.losses(groups[:MAX_CURVES]), "total": len(groups)}
