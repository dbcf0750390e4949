"""Panels as SVG that takes its colours from the page, legible in light and in dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wmdd.report.families import TITLES

MAX_PANELS = 6
"""Panels of one kind; more settings than these are read in the tables."""
LOSSES = ("total", "feature", "bn", "ce")
PHASES = ("p0", "p1", "p2", "p3", "p4", "p5")
COLOURS = {
    name: f"#1000{number:02x}"
    for number, name in enumerate(("ink", "quiet", "line", "page", "rest", *LOSSES, *TITLES, *PHASES))
}
"""Stand-ins, replaced by the page's own colours."""


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
    legend: list[tuple[str, str, str]]
    """(name, variable of the page's style, dashes of its line in the manner of SVG)."""


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
        colours: dict[str, str] = COLOURS,
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
            # A page asks for the parts of one method by its name; ids must be unique, and methods recur.
            svg = re.sub(r'id="method:([^"]*)"', r'data-method="\1"', svg)
            for name, colour in self._colours.items():
                svg = svg.replace(colour, f"var(--{name})")
            self.svg = svg[svg.index("<svg") :]
        self._context.__exit__(*error)


def ticks(axes: Any, values: Sequence[float]) -> None:
    """Put the ticks of the axis x at the values alone."""
    from matplotlib.ticker import NullLocator

    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def amounts(axes: Any, values: Sequence[float], unit: str) -> None:
    """Scale the axis x of amounts, logarithmic over more than a decade; a unit takes prefixes."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    if max(values) > 10 * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(unit) if unit else "{x:g}")
    axes.margins(x=0.12)
