"""The table of measured and published accuracies."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.report.families import bare
from wmdd.report.format import NONE, Row, percent
from wmdd.report.published import PublishedAccuracy
from wmdd.report.table import Table

if TYPE_CHECKING:
    from wmdd.report.collect import Report

Place = tuple[Any, ...]
_COLUMNS = ("Recipe", "Data set", "Network", "IPC", "Labels", "Method", "Measured %", "Last epoch and best %")
_PUBLISHED = ("Published %", "Published at", "Checkpoint", "Mark", "Source", "Address", "Note")
_REPLICATIONS = ("paper", "upstream")
"""Names of the recipes that repeat what was published; figures stand beside these alone."""


def published(report: "Report") -> Table:
    """Return measured rows and published figures of the same data, classes, IPC, network and kind of labels.

    A figure stands beside a measured row only where the run goes by ``paper`` or ``upstream`` and has the figure's
    resolution; all other figures have rows of their own. Accuracies on held-out images are left out.
    """
    figures: dict[Place, list[PublishedAccuracy]] = {}
    for figure in (figure for figure in report.published if figure.entry.study == "main"):
        kind = figure.entry.regime if figure.ipc else "hard"
        place = figure.dataset, figure.classes, figure.ipc, figure.entry.network, kind
        figures.setdefault(place, []).append(figure)
    measured: dict[Place, list[Row]] = {}
    for row in report.accuracy.to_dict("records"):
        whole = pd.isna(row["ipc"])
        kind = "hard" if whole or row["regime"] == "hard" else "soft"
        if row["view"] == "epochs" and row["recipe"]["evaluated_on"] == "test" and row["regime"] != "budget":
            place = row["dataset"], row["classes"], None if whole else row["ipc"], row["network"], kind
            measured.setdefault(place, []).append(row)
    lines: list[list[str]] = []
    origins = []
    for place, own in measured.items():
        here = figures.get(place, [])
        shown = set()
        for row in own if here else ():
            match = next((figure for figure in here if _replicates(row, figure)), None)
            shown.add(match)
            lines.append([*_place(place, row), row["method"], percent(row, "top1"), _best(row), *_literature(match)])
            origins.append(row["origins"])
        for figure in sorted(here, key=lambda figure: -figure.top1):
            if figure not in shown:
                away = [figure.entry.method, NONE, NONE, *_literature(figure, {row["resolution"] for row in own})]
                lines.append([*_place(place, None), *away])
                origins.append([])
    return Table(
        title="Measured and published",
        caption=(
            "What was measured here, and what is published for the same dataset, number of classes, IPC, network, kind"
            " of labels and test set. A figure stands beside a measured row only where the run repeats the published"
            " recipe (paper, upstream) at its resolution. Measured accuracies are of the last epoch. Author: read in"
            " the authors' own pages; second-hand: quoted by others; memory: to be checked."
        ),
        columns=[*_COLUMNS, *_PUBLISHED],
        rows=lines,
        words=6,
        tail=6,
        setting=5,
        origins=origins,
        optional=frozenset(["Mark", "Address"]),
    )


def _replicates(row: Row, figure: PublishedAccuracy) -> bool:
    entry = figure.entry
    if figure.ipc is None:
        return False
    named = (entry.ours or entry.method.lower()) == bare(row["method"])
    recipe = str(row["name"]).rpartition("+")[2]  # of wmdd run PRESET+paper, and of a protocol's row
    return named and recipe in _REPLICATIONS and entry.resolution in (None, row["resolution"])


def _place(place: Place, row: Row | None) -> list[str]:
    dataset, classes, ipc, network, kind = place
    recipe = NONE if row is None or pd.isna(row["recipe_name"]) else row["recipe_name"] or NONE
    return [recipe, f"{dataset} ({classes} classes)", network, str(ipc or "all"), kind if ipc else NONE]


def _best(row: Row) -> str:
    """Return the last and the best epoch of students that were validated on the way."""
    if pd.isna(row["best_top1"]):
        return NONE
    return f"{100 * row['top1']:.1f}, best {100 * row['best_top1']:.1f}"


def _literature(figure: PublishedAccuracy | None, resolutions: set[Any] = frozenset()) -> list[str]:  # type: ignore[assignment]
    if figure is None:
        return [NONE] * len(_PUBLISHED)
    entry = figure.entry
    value = f"{100 * figure.top1:.1f}" + (f" ± {100 * figure.spread:.1f}" if figure.spread is not None else "")
    resolution = f"{entry.resolution} px" if entry.resolution else "?"
    if entry.resolution and resolutions and entry.resolution not in resolutions:
        resolution += " (another resolution)"
    source = entry.source + (f", {entry.table}" if entry.table else "")
    checkpoint = entry.checkpoint or "not known"
    return [value, resolution, checkpoint, entry.mark, source, entry.url or NONE, entry.note or NONE]
