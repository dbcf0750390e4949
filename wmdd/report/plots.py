"""Plots as SVG that takes its colours from the page, legible in light and in dark."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.report.aggregate import where
from wmdd.report.comparison import REFERENCE, SETTING

if TYPE_CHECKING:
    from wmdd.report.collect import Report

MAX_PANELS = 6
"""Panels of one kind; more settings than these are read in the tables."""
SERIES = 8
"""Colours for methods; further ones begin again with dashed lines."""

_LOSSES = ("total", "feature", "bn", "ce")
_COLOURS = {
    name: f"#1000{number:02x}"
    for number, name in enumerate(("ink", "quiet", "line", "page", *_LOSSES, *(f"s{i}" for i in range(SERIES))))
}
"""Stand-ins, replaced by the page's own colours."""
_VIEWS = ("epochs", "updates", "plain")
_MARKERS = {"hard": "o", "soft": "^", "stored": "s", "budget": "D"}

Row = dict[str, Any]
Looks = dict[str, tuple[str, bool]]
"""(variable of the colour, whether the line is dashed) of each method."""


@dataclass(frozen=True)
class Plot:
    """One panel."""

    title: str
    svg: str


@dataclass(frozen=True)
class PlotGroup:
    """Panels of one kind, with one legend."""

    title: str
    caption: str
    panels: list[Plot]
    total: int
    """Panels that there would be without ``MAX_PANELS``."""
    legend: list[tuple[str, str, bool]]
    """(name, variable of the page's style, whether its line is dashed)."""


class Drawing:
    """A matplotlib figure without a window; its SVG is there after the block.

    Args:
        salt: tells the ids of plots apart that end up in one page.
        size: in inches.
        colours: stand-in of each variable of the page's style.
        fixed: use margins that the labels of small plots fit; searching for the best takes as long as drawing.
    """

    def __init__(
        self,
        salt: str,
        size: tuple[float, float] = (3.4, 2.5),
        colours: dict[str, str] = _COLOURS,
        fixed: bool = True,
    ) -> None:
        import matplotlib as mpl

        quiet = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        style: dict[Any, Any] = dict.fromkeys(quiet, colours["quiet"])
        style |= {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
        style |= {"axes.spines.top": False, "axes.spines.right": False}
        self._context, self._size, self._colours, self._fixed = mpl.rc_context(style), size, colours, fixed
        self.svg = ""

    def __enter__(self) -> "Drawing":
        from matplotlib.figure import Figure as Canvas

        self._context.__enter__()
        self.figure = Canvas(figsize=self._size, layout=None if self._fixed else "constrained")
        if self._fixed:
            self.figure.subplots_adjust(left=0.18, right=0.94, bottom=0.2, top=0.95)
        self.axes: Any = self.figure.add_subplot()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            content = io.StringIO()
            self.figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
            svg = re.sub(r"<metadata>.*?</metadata>", "", content.getvalue(), flags=re.DOTALL)
            for name, colour in self._colours.items():
                svg = svg.replace(colour, f"var(--{name})")
            self.svg = svg[svg.index("<svg") :]
        self._context.__exit__(*error)


def figures(report: "Report") -> list[PlotGroup]:
    """Return the plots that have something to show: at least two points on their axis."""
    rows = [row for row in report.accuracy.to_dict("records") if not pd.isna(row["ipc"])]
    look = _looks(rows)
    made = [_over_ipc(rows, look), _over_bytes(rows, look), _over_device_hours(rows, look), _over_bn_weight(rows, look)]
    return [figure for figure in [*made, _over_ranks(report)] if figure.panels]


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
    """Return the look of each method, the same in every plot; the baseline is quiet."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    others = [name for name in names if name.partition(" ")[0] != REFERENCE]
    looks = {name: (f"s{index % SERIES}", index >= SERIES) for index, name in enumerate(others)}
    return {name: looks.get(name, ("quiet", False)) for name in names}


def _legend(rows: Sequence[Row], look: Looks) -> list[tuple[str, str, bool]]:
    return [(name, *look[name]) for name in dict.fromkeys(row["method"] for row in rows)]


def _grouped(rows: Sequence[Row], *left_out: str) -> list[tuple[dict[str, Any], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    keys = [key for key in SETTING if key not in left_out]
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = [(dict(zip(keys, group, strict=True)), own) for group, own in groups.items()]
    return sorted(found, key=lambda pair: _VIEWS.index(pair[0]["view"]))  # what is compared most comes first


def _over_ipc(rows: Sequence[Row], look: Looks) -> PlotGroup:
    groups = [(at, own) for at, own in _grouped(rows, "ipc") if len({row["ipc"] for row in own}) > 1]
    panels: list[Plot] = []
    for at, own in groups[:MAX_PANELS]:
        with Drawing(f"ipc{len(panels)}") as drawing:
            for method in dict.fromkeys(row["method"] for row in own):
                line = sorted((row for row in own if row["method"] == method), key=lambda row: row["ipc"])
                _line(drawing.axes, [row["ipc"] for row in line], line, *look[method])
            drawing.axes.set_xscale("log")
            _ticks(drawing.axes, sorted({row["ipc"] for row in own}))
            _labelled(drawing.axes, "images per class")
        panels.append(Plot(_title(at), drawing.svg))
    shown = [row for _, own in groups[:MAX_PANELS] for row in own]
    caption = "Bars: 95 % intervals of the accuracy table."
    return PlotGroup("Accuracy over IPC", caption, panels, len(groups), _legend(shown, look))


def _over_bytes(rows: Sequence[Row], look: Looks) -> PlotGroup:
    known = [row for row in rows if not pd.isna(row["image_bytes"]) and not pd.isna(row["label_bytes"])]
    caption = (
        "Images and labels on disk, and the Pareto front (line): no point on it is beaten in both. "
        "Labels made online take no bytes here; the teacher that makes them stands in the table."
    )
    return _fronts(
        "Accuracy over bytes",
        caption,
        "bytes of images and labels",
        "B",
        known,
        look,
        lambda row: float(row["image_bytes"] + row["label_bytes"]),
    )


def _over_device_hours(rows: Sequence[Row], look: Looks) -> PlotGroup:
    known = [row for row in rows if not pd.isna(row["device_seconds"]) and row["device_seconds"] > 0]
    caption = "What teacher, statistics and synthesis of one distilled set took; the line is the Pareto front."
    return _fronts(
        "Accuracy over device-hours", caption, "device-hours", "", known, look, lambda row: row["device_seconds"] / 3600
    )


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
            drawing.axes.plot(*zip(*front, strict=True), color=_COLOURS["quiet"], linewidth=1, zorder=1)
            for (x, y), row in zip(points, own, strict=True):
                colour, faint = look[row["method"]]
                fill = _COLOURS[colour if (x, y) in front else "page"]
                edge = {"markeredgecolor": _COLOURS[colour], "markerfacecolor": fill, "alpha": 0.6 if faint else 1}
                drawing.axes.plot(x, y, _MARKERS[row["regime"]], markersize=5, zorder=2, **edge)
                if (x, y) in front:
                    small = {"textcoords": "offset points", "fontsize": 7, "color": _COLOURS["quiet"], "ha": "right"}
                    drawing.axes.annotate(str(row["ipc"]), (x, y), (-5, 2), **small)
            _amounts(drawing.axes, [x for x, _ in points], unit)
            _labelled(drawing.axes, label)
        panels.append(Plot(_title(place), drawing.svg))
    shown = [row for _, own in groups[:MAX_PANELS] for row in own]
    signs = {"hard": "● hard", "soft": "▲ soft", "stored": "■ stored", "budget": "◆ budget"}
    regimes = ", ".join(sign for name, sign in signs.items() if any(row["regime"] == name for row in shown))
    caption += f" Labels: {regimes}; filled: on the front, with its images per class."
    return PlotGroup(title, caption, panels, len(groups), _legend(shown, look))


def _over_bn_weight(rows: Sequence[Row], look: Looks) -> PlotGroup:
    """λ where runs differ in nothing else, by setting and by all that else decides the images."""
    known: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not pd.isna(row["bn_weight"]) and row["bn_weight"] > 0:
            known.setdefault((*(row[key] for key in SETTING), row["otherwise"]), []).append(row)
    groups = [own for own in known.values() if len({row["bn_weight"] for row in own}) > 1]
    groups.sort(key=lambda own: _VIEWS.index(own[0]["view"]))
    panels: list[Plot] = []
    for own in groups[:MAX_PANELS]:
        own.sort(key=lambda row: row["bn_weight"])
        with Drawing(f"lambda{len(panels)}") as drawing:
            _line(drawing.axes, [row["bn_weight"] for row in own], own, "s0", False)
            drawing.axes.set_xscale("log")
            _ticks(drawing.axes, sorted({row["bn_weight"] for row in own}))
            _labelled(drawing.axes, "λ (synthesis.bn_weight)")
        panels.append(Plot(where([own[0][key] for key in SETTING]), drawing.svg))
    caption = "Runs that differ in the weight λ of the BatchNorm term alone."
    return PlotGroup("Response to λ", caption, panels, len(groups), [])


def _over_ranks(report: "Report") -> PlotGroup:
    from matplotlib.ticker import EngFormatter

    groups: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for _, speed in report.speeds:
        if speed.kind == "scaling" and "rate" in speed.metrics:
            key = (speed.stage, speed.mode, speed.dataset, speed.network, speed.resolution, speed.unit)
            groups.setdefault(key, {}).setdefault(speed.engine, []).append(speed)
    scaled = {key: own for key, own in groups.items() if any(len({s.ranks for s in line}) > 1 for line in own.values())}
    engines = list(dict.fromkeys(engine for own in scaled.values() for engine in own))
    panels: list[Plot] = []
    for (stage, mode, dataset, network, resolution, unit), own in list(scaled.items())[:MAX_PANELS]:
        with Drawing(f"ranks{len(panels)}") as drawing:
            for engine, line in own.items():
                line.sort(key=lambda speed: speed.ranks)
                ranks, rates = [speed.ranks for speed in line], [speed.metrics["rate"] for speed in line]
                low, high = ([s.metrics.get(f"rate_{end}", s.metrics["rate"]) for s in line] for end in ("low", "high"))
                bars = [[max(0, r - x) for r, x in zip(rates, low, strict=True)]]
                bars.append([max(0, x - r) for r, x in zip(rates, high, strict=True)])
                colour = _COLOURS[f"s{engines.index(engine) % SERIES}"]
                drawing.axes.errorbar(ranks, rates, bars, color=colour, marker="o", markersize=4, linewidth=1.5)
                ideal = [rates[0] * n / ranks[0] for n in ranks]
                drawing.axes.plot(ranks, ideal, ":", color=_COLOURS["quiet"], linewidth=1)
            _ticks(drawing.axes, sorted({speed.ranks for line in own.values() for speed in line}))
            drawing.axes.set_ylim(bottom=0)
            drawing.axes.yaxis.set_major_formatter(EngFormatter())
            drawing.axes.set_xlabel("ranks")
            drawing.axes.set_ylabel(unit)
        what = ", ".join(str(part) for part in (network, resolution and f"{resolution} px") if part)
        panels.append(Plot(f"{stage}, {mode or 'strong'} scaling: {dataset}{', ' + what if what else ''}", drawing.svg))
    legend = [(engine, f"s{number % SERIES}", False) for number, engine in enumerate(engines)]
    caption = "Median rate, bars from the least to the most of the repeats; dotted: proportional to the ranks."
    return PlotGroup("Throughput over ranks", caption, panels, len(scaled), legend)


def losses(curves: Sequence[tuple[str, dict[str, list[float]]]]) -> PlotGroup:
    """Return the terms of the loss of some groups over the iterations of synthesis, logarithmic."""
    panels = [Plot(title, _loss(curve, number)) for number, (title, curve) in enumerate(curves)]
    names = [name for name in _LOSSES if any(any(curve.get(name, ())) for _, curve in curves)]
    return PlotGroup("Loss curves", "", panels, len(panels), [(name, name, False) for name in names])


def _loss(curve: dict[str, list[float]], number: int) -> str:
    from matplotlib.ticker import LogLocator, NullFormatter

    with Drawing(f"curve{number}", (3.2, 2.2)) as drawing:
        axes = drawing.axes
        for name in _LOSSES:
            if any(curve.get(name, ())):
                width = 3 if name == "total" else 1.5
                axes.plot(curve["iteration"], curve[name], color=_COLOURS[name], linewidth=width)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("iteration")
    return drawing.svg


def _line(axes: Any, x: Sequence[float], rows: Sequence[Row], colour: str, dashed: bool) -> None:
    """Draw accuracies in percent with their intervals, as far as they are known."""
    bars = [0.0 if pd.isna(row["top1_half_width"]) else 100 * row["top1_half_width"] for row in rows]
    style = {
        "color": _COLOURS[colour],
        "marker": "o",
        "linestyle": "--" if dashed else "-",
        "markersize": 4,
        "linewidth": 1.5,
        "elinewidth": 0.9,
    }
    axes.errorbar(x, [100 * row["top1"] for row in rows], bars, capsize=2, **style)


def _ticks(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _amounts(axes: Any, values: Sequence[float], unit: str) -> None:
    """Scale the axis of amounts, logarithmic over more than a decade; a unit takes prefixes."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    if max(values) > 10 * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(unit) if unit else "{x:g}")
    axes.margins(x=0.12)


def _labelled(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 %")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(100.5, high))  # few seeds make intervals wider than what an accuracy can be


def _title(at: dict[str, Any]) -> str:
    regime = f", {at['regime']} labels" if "regime" in at else ""
    view = {"epochs": "", "updates": ", fixed updates", "plain": ", no augmentation"}[at["view"]]
    return f"{at['dataset']} ({at['classes']} classes, {at['resolution']} px), {at['network']}{regime}{view}"
