"""The report as one HTML page that loads nothing: tables, loss curves and images of the distilled sets."""

import base64
import io
import re
from importlib import resources
from pathlib import Path
from typing import Any

from wmdd.compared import headlines
from wmdd.errors import WmddError
from wmdd.files import read_tensors, write_bytes
from wmdd.metrics import REFERENCE
from wmdd.report import Report
from wmdd.runs import Run
from wmdd.spent import coverage_line
from wmdd.tables import tables

MAX_CURVES = 12
"""Groups whose loss curves the page shows."""
MAX_SETS, MAX_CLASSES, MAX_IMAGES, MAX_PIXELS = 4, 20, 10, 64
"""Distilled sets that the page shows, classes of each, images of a class, pixels of a thumbnail."""

_LINES = {"total": "#100001", "feature": "#100002", "bn": "#100003", "ce": "#100004"}
_AXES = {"quiet": "#100005"}
"""Terms of the loss and the axes, in colours that stand for the page's own: plots are legible in light and in dark."""


def write_html(report: Report, path: Path) -> None:
    """Write the report as one page that loads nothing: styles, plots and images are inside it.

    Raises:
        WmddError: the page cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["sha"] = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}").fullmatch
    template = environment.from_string((resources.files("wmdd") / "templates" / "report.html.j2").read_text())
    problems = list(report.problems)
    times = sorted(f"{record.time:%Y-%m-%d}" for run in report.runs for record in run.records)
    page = template.render(
        datasets=list(dict.fromkeys(report.accuracy["dataset"])),
        coverage=coverage_line(report),
        runs=len(report.runs),
        numbers=sum(len(run.records) for run in report.runs),
        dates=list(dict.fromkeys(times[:1] + times[-1:])),
        headlines=headlines(report),
        tables={table.title.lower(): table for table in tables(report)},
        pictures=_pictures(report.runs, problems),
        curves=_curves(report.runs),
        caps={"sets": MAX_SETS, "classes": MAX_CLASSES, "images": MAX_IMAGES, "pixels": MAX_PIXELS},
        problems=problems,
    )
    write_bytes(path, page.encode())


def _pictures(runs: list[Run], problems: list[str]) -> dict[str, Any]:
    """Return distilled images beside a baseline's, class by class, for the first seed of each distilled set."""
    first: dict[tuple[Any, ...], Run] = {}
    for run in sorted((run for run in runs if run.owner is None), key=lambda run: run.config.get("seed", 0)):
        if run.blocks:
            first.setdefault((run.name, run.method, run.config.get("ipc")), run)
    sets = []
    for run in list(first.values())[:MAX_SETS]:
        others = sorted((r for r in runs if r.owner == run.folder and r.blocks), key=lambda r: r.method != REFERENCE)
        shown = [run, *others[:1]]
        images = [_thumbnails(one, problems) for one in shown]
        classes = [{"name": name, "sides": [side.get(name, []) for side in images]} for name in images[0]]
        total = sum(len(sidecar.get("classes", ())) for sidecar in run.blocks.values())
        sets.append({"run": run.label, "methods": [r.method for r in shown], "classes": classes, "total": total})
    return {"sets": sets, "total": len(first)}


def _thumbnails(run: Run, problems: list[str]) -> dict[str, list[str]]:
    """Return the PNG data URIs of the first images of the first classes, by class."""
    found: dict[str, list[str]] = {}
    for index, sidecar in sorted(run.blocks.items()):
        try:
            tensors = read_tensors(run.folder / "blocks" / f"block-{index:05d}.safetensors")
        except WmddError as error:
            problems.append(str(error).replace(str(run.folder), run.label))
            continue
        for name, label in zip(sidecar.get("classes", ()), sidecar.get("class_indices", ()), strict=True):
            if len(found) == MAX_CLASSES:
                return found
            found[name] = [_png(image) for image in tensors["images"][tensors["labels"] == label][:MAX_IMAGES]]
    return found


def _png(image: Any) -> str:
    """Return a uint8 image [C, H, W], grey or RGB, as a data URI; large ones are made smaller."""
    from PIL import Image

    picture = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    content = io.BytesIO()
    picture.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _curves(runs: list[Run]) -> dict[str, Any]:
    """Return the loss curves of the first groups as SVG, and how many groups there are."""
    groups = [
        (f"{run.label}: {', '.join(map(str, group.get('classes', ())))}", group["curve"])
        for run in runs
        for group in run.groups
        if len((group.get("curve") or {}).get("iteration", ())) > 1
    ]
    drawn = [{"title": title, "svg": _plot(curve, n)} for n, (title, curve) in enumerate(groups[:MAX_CURVES])]
    names = [name for name in _LINES if any(any(curve.get(name, ())) for _, curve in groups[:MAX_CURVES])]
    return {"groups": drawn, "total": len(groups), "names": names}


def _plot(curve: dict[str, list[float]], number: int) -> str:
    """Return the terms of one loss over the iterations, logarithmic, as an SVG that takes its colours from the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    # Each plot salts its ids, because all of them end up in one page.
    style: dict[Any, Any] = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _AXES["quiet"]
    )
    style |= {"svg.fonttype": "none", "svg.hashsalt": f"curve{number}"}
    with mpl.rc_context({**style, "font.size": 9}):
        figure = Figure(figsize=(3.2, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for name, colour in _LINES.items():
            if any(curve.get(name, ())):
                axes.plot(curve["iteration"], curve[name], color=colour, linewidth=3 if name == "total" else 1.5)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("iteration")
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", content.getvalue(), flags=re.DOTALL)
    for name, colour in {**_LINES, **_AXES}.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg[svg.index("<svg") :]
