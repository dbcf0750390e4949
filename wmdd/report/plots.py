"""Plots of accuracy: over images per class, over bytes, over device-hours and over λ; loss curves."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.report.accuracy_tables import all_bytes
from wmdd.report.aggregate import where
from wmdd.report.comparison import COMPARABLE
from wmdd.report.drawing import COLOURS, LOSSES, MAX_PANELS, Drawing, Plot, PlotGroup, amounts, ticks
from wmdd.report.families import bare, dashes, family, foremost
from wmdd.report.format import Row
from wmdd.report.sections import VIEWS
from wmdd.report.speed_plots import throughput_over_ranks, throughput_ratios, time_by_phase

if TYPE_CHECKING:
    from wmdd.report.collect import Report

_MARKERS = {"hard": "o", "soft": "^", "stored": "s", "budget": "D"}
_DASHES = {"-": "", "--": "7 3", ":": "2 3", "-.": "7 3 2 3"}
_NEEDS_NO_TEACHER = ("random", "noise")
"""Methods whose images need no teacher; their hard students need none either."""

Looks = dict[str, tuple[str, str]]
"""(variable of the colour, style of the line) of each method."""


def figures(report: "Report") -> list[PlotGroup]:
    """Return the plots that have something to show: at least two points on their axis."""
    rows = [row for row in report.accuracy.to_dict("records") if not pd.isna(row["ipc"])]
    look = _looks(rows)
    made = [_over_ipc(rows, look), _over_bytes(rows, look), _over_device_hours(rows, look), _over_bn_weight(rows)]
    speeds = [speed for _, speed in report.speeds]
    made += [throughput_ratios(speeds), throughput_over_ranks(speeds), time_by_phase(speeds)]
    return [figure for figure in made if figure.panels]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points (cost, worth) that no other beats: none costs less and is worth as much.

    In the order of rising cost.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _looks(rows: Sequence[Row]) -> Looks:
    """Return the look of each method, the same in every plot: the colour of its family, or grey beyond six."""
    best = sorted(rows, key=lambda row: -row["top1"])
    names = list(dict.fromkeys(row["method"] for row in best))
    shown, lines = foremost(names), dashes(names)
    return {name: (family(name) if name in shown else "rest", lines[name]) for name in names}


def _legend(rows: Sequence[Row], look: Looks) -> list[tuple[str, str, str]]:
    names = dict.fromkeys(row["method"] for row in rows)
    found = [(name, look[name][0], _DASHES[look[name][1]]) for name in names]
    return sorted(found, key=lambda entry: entry[1] == "rest")


def _grouped(rows: Sequence[Row], *left_out: str) -> list[tuple[dict[str, Any], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    keys = [key for key in COMPARABLE if key not in left_out]
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = [(dict(zip(keys, group, strict=True)), own) for group, own in groups.items()]
    return sorted(found, key=lambda pair: list(VIEWS).index(pair[0]["view"]))  # what is compared most comes first


def _over_ipc(rows: Sequence[Row], look: Looks) -> PlotGroup:
    groups = [(at, own) for at, own in _grouped(rows, "ipc") if len({row["ipc"] for row in own}) > 1]
    panels: list[Plot] = []
    for at, own in groups[:MAX_PANELS]:
        with Drawing(f"ipc{len(panels)}") as drawing:
            # Grey lines lie below the others.
            for method in sorted(dict.fromkeys(row["method"] for row in own), key=lambda name: look[name][0] != "rest"):
                line = sorted((row for row in own if row["method"] == method), key=lambda row: row["ipc"])
                _line(drawing.axes, [row["ipc"] for row in line], line, method, look[method])
            drawing.axes.set_xscale("log")
            ticks(drawing.axes, sorted({row["ipc"] for row in own}))
            _labelled(drawing.axes, "images per class")
        panels.append(Plot(_title(at), drawing.svg))
    shown = [row for _, own in groups[:MAX_PANELS] for row in own]
    caption = "Bars: 95 % intervals of the accuracy table. A colour is a family of methods."
    if any(look[row["method"]][0] == "rest" for row in shown):
        caption += " Grey: further methods; choose one in the legend to see it."
    return PlotGroup("Accuracy over IPC", caption, panels, len(groups), _legend(shown, look))


def _over_bytes(rows: Sequence[Row], look: Looks) -> PlotGroup:
    known = [row for row in rows if all_bytes(row) is not None]
    caption = (
        "Images, labels, and the teacher where it makes the labels online (hollow). The staircase is the Pareto front:"
        " no point on it is beaten in both. Members whose bars overlap are not told apart."
    )
    return _fronts(
        "Accuracy over bytes", caption, "bytes that students need", "B", known, look, lambda row: all_bytes(row) or 0.0
    )


def _over_device_hours(rows: Sequence[Row], look: Looks) -> PlotGroup:
    known = [row for row in rows if not pd.isna(row["device_seconds"]) and hours_of_a_set(row) > 0]
    caption = (
        "Device-hours of statistics and synthesis of one distilled set, and the teacher, where the images or the labels"
        " need one: shared among the sets, with a line to what the first set costs. The staircase is the Pareto front."
    )
    return _fronts("Accuracy over device-hours", caption, "device-hours", "", known, look, hours_of_a_set)


def hours_of_a_set(row: Row, first: bool = False) -> float:
    """Return the device-hours of one distilled set, with the teacher's share; of the first set, the whole teacher."""
    own, teacher = float(row["device_seconds"]), row["teacher_device_seconds"]
    idle = bare(row["method"]) in _NEEDS_NO_TEACHER and row["regime"] == "hard"
    whole = 0.0 if idle or pd.isna(teacher) else float(teacher)
    return (own + (whole if first else whole / row["sets"])) / 3600


def _fronts(
    title: str,
    caption: str,
    label: str,
    unit: str,
    rows: Sequence[Row],
    look: Looks,
    at: Callable[[Row], float],
) -> PlotGroup:
    groups = [(place, own) for place, own in _grouped(rows, "ipc", "regime") if len({at(row) for row in own}) > 1]
    panels: list[Plot] = []
    for place, own in groups[:MAX_PANELS]:
        points = [(at(row), 100 * row["top1"]) for row in own]
        with Drawing(f"{title}{len(panels)}") as drawing:
            front = [points[index] for index in pareto(points)]
            stairs = {"color": COLOURS["quiet"], "linewidth": 1, "zorder": 1, "drawstyle": "steps-post"}
            edge = max(x for x, _ in points)
            drawing.axes.plot(*zip(*front, (edge, front[-1][1]), strict=True), **stairs)
            for (x, y), row in zip(points, own, strict=True):
                _mark(drawing.axes, x, y, row, look, hollow=row["regime"] == "soft" and unit == "B")
                if not unit and (whole := hours_of_a_set(row, first=True)) > x:
                    tail = {"color": COLOURS[look[row["method"]][0]], "linewidth": 0.8, "zorder": 1}
                    drawing.axes.plot([x, whole], [y, y], ":", gid=f"method:{row['method']}", **tail)
                if (x, y) in front:
                    small = {"textcoords": "offset points", "fontsize": 7, "color": COLOURS["quiet"], "ha": "right"}
                    drawing.axes.annotate(str(row["ipc"]), (x, y), (-5, 3), **small)
            amounts(drawing.axes, [x for x, _ in points], unit)
            _labelled(drawing.axes, label)
        panels.append(Plot(_title(place), drawing.svg))
    shown = [row for _, own in groups[:MAX_PANELS] for row in own]
    signs = {"hard": "● hard", "soft": "▲ soft", "stored": "■ stored", "budget": "◆ budget"}
    regimes = ", ".join(sign for name, sign in signs.items() if any(row["regime"] == name for row in shown))
    caption += f" Labels: {regimes}. Numbers on the front: images per class."
    return PlotGroup(title, caption, panels, len(groups), _legend(shown, look))


def _mark(axes: Any, x: float, y: float, row: Row, look: Looks, hollow: bool) -> None:
    colour = COLOURS[look[row["method"]][0]]
    half = 0.0 if pd.isna(row["top1_half_width"]) else 100 * row["top1_half_width"]
    face = COLOURS["page"] if hollow else colour
    style = {"markeredgecolor": colour, "markerfacecolor": face, "ecolor": colour, "elinewidth": 0.8, "markersize": 5}
    drawn = axes.errorbar(x, y, half, fmt=_MARKERS[row["regime"]], zorder=2, **style)
    _named(drawn, row["method"])


def _over_bn_weight(rows: Sequence[Row]) -> PlotGroup:
    """λ where runs differ in nothing else, by setting and by all that else decides the images."""
    known: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not pd.isna(row["bn_weight"]) and row["bn_weight"] > 0:
            known.setdefault((*(row[key] for key in COMPARABLE), row["otherwise"]), []).append(row)
    groups = [own for own in known.values() if len({row["bn_weight"] for row in own}) > 1]
    groups.sort(key=lambda own: list(VIEWS).index(own[0]["view"]))
    panels: list[Plot] = []
    for own in groups[:MAX_PANELS]:
        own.sort(key=lambda row: row["bn_weight"])
        with Drawing(f"lambda{len(panels)}") as drawing:
            name = own[0]["method"]
            _line(drawing.axes, [row["bn_weight"] for row in own], own, name, (family(name), "-"))
            drawing.axes.set_xscale("log")
            ticks(drawing.axes, sorted({row["bn_weight"] for row in own}))
            _labelled(drawing.axes, "λ (synthesis.bn_weight)")
        panels.append(Plot(where([own[0][key] for key in COMPARABLE]), drawing.svg))
    caption = "Runs that differ in the weight λ of the BatchNorm term alone."
    return PlotGroup("Response to λ", caption, panels, len(groups), [])


def losses(curves: Sequence[tuple[str, dict[str, list[float]]]]) -> PlotGroup:
    """Return the terms of the loss of some groups over the iterations of synthesis, logarithmic."""
    panels = [Plot(title, _loss(curve, number)) for number, (title, curve) in enumerate(curves)]
    names = [name for name in LOSSES if any(any(curve.get(name, ())) for _, curve in curves)]
    return PlotGroup("Loss curves", "", panels, len(panels), [(name, name, "") for name in names])


def _loss(curve: dict[str, list[float]], number: int) -> str:
    from matplotlib.ticker import LogLocator, NullFormatter

    with Drawing(f"curve{number}", (3.2, 2.2)) as drawing:
        axes = drawing.axes
        for name in LOSSES:
            if any(curve.get(name, ())):
                width = 3 if name == "total" else 1.5
                axes.plot(curve["iteration"], curve[name], color=COLOURS[name], linewidth=width, gid=f"method:{name}")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("iteration")
    return drawing.svg


def _line(axes: Any, x: Sequence[float], rows: Sequence[Row], method: str, look: tuple[str, str]) -> None:
    """Draw accuracies in percent with their intervals, as far as they are known."""
    bars = [0.0 if pd.isna(row["top1_half_width"]) else 100 * row["top1_half_width"] for row in rows]
    style = {
        "color": COLOURS[look[0]],
        "marker": "o",
        "linestyle": look[1],
        "markersize": 4,
        "linewidth": 1.5,
        "elinewidth": 0.9,
    }
    _named(axes.errorbar(x, [100 * row["top1"] for row in rows], bars, capsize=2, **style), method)


def _named(drawn: Any, method: str) -> None:
    """Give all parts of an error bar the name of their method."""
    line, caps, bars = drawn.lines
    for part in (line, *caps, *bars):
        part.set_gid(f"method:{method}")


def _labelled(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 %")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(100.5, high))  # few seeds make intervals wider than what an accuracy can be


def _title(at: dict[str, Any]) -> str:
    regime = f", {at['regime']} labels" if "regime" in at else ""
    recipe = f", recipe {at['recipe_name']}" if at["recipe_name"] else ""
    what = f"{at['dataset']} ({at['classes']} classes, {at['resolution']} px), {at['network']}"
    return f"{what}{regime}{VIEWS[at['view']]}{recipe}"
