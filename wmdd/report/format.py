"""Numbers as text."""

from typing import Any

import pandas as pd

from wmdd.report.comparison import SAME

NONE = "–"

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


UNITS = {"checkpoint": "epoch", "resolution": "px"}

Row = dict[str, Any]


def setting_cells(row: Row) -> list[str]:
    """Return recipe, data set, network, view, IPC and labels of a row of ``aggregate.accuracy``."""
    recipe = NONE if pd.isna(row["recipe_name"]) else row["recipe_name"] or NONE
    view = NONE if pd.isna(row["view"]) else row["view"]
    ipc = "all" if pd.isna(row["ipc"]) else str(row["ipc"])
    regime = NONE if pd.isna(row["regime"]) else row["regime"]
    return [recipe, row["dataset"], row["network"], view, ipc, regime]


def percent(row: Row, metric: str) -> str:
    """Return an accuracy in percent: with its interval, or with the least and the most value where there is none."""
    mean, half_width = row[metric], row[f"{metric}_half_width"]
    if pd.isna(mean):
        return NONE
    if not pd.isna(half_width):
        return f"{100 * mean:.1f} ± {100 * half_width:.1f}"
    least, most = row[f"{metric}_least"], row[f"{metric}_most"]
    # Several values that agree to the last digit are one figure.
    span = f"{100 * least:.1f}–{100 * most:.1f}" if row["n"] > 1 else ""
    return f"{100 * mean:.1f}" + (f" ({span})" if span and span != f"{100 * mean:.1f}–{100 * mean:.1f}" else "")


def difference(row: Row, prefix: str = "", unit: str = "") -> str:
    """Return a difference in points with its interval: to the baseline, or with ``coreset_`` to the coreset."""
    value, scope, low, high = (row[f"{prefix}{key}"] for key in ("difference", "scope", "low", "high"))
    if pd.isna(value) or scope == SAME:
        return NONE if pd.isna(value) else SAME
    text = with_interval(value, low, high)
    return f"{text}{unit} (this set only)" if scope == "this set" else f"{text}{unit}"


def with_interval(value: Any, low: Any, high: Any, sign: str = "+") -> str:
    """Return a fraction as hundredths, with its interval where one is known."""
    text = points(value, sign)
    return text if pd.isna(low) else f"{text} [{points(low)}, {points(high)}]"


def behind(row: Row) -> str:
    """Return the lead of the best method of the setting in points, with its interval, where sets can be compared."""
    if row["behind_scope"] != "sets":
        return NONE
    return with_interval(row["behind"], row["behind_low"], row["behind_high"])


def count(row: Row) -> str:
    """Return distinct distilled sets × students of each."""
    if pd.isna(row["sets"]):
        return str(row["n"])
    crossed = f"{row['sets']}×{row['students']}"
    return crossed if row["n"] == row["sets"] * row["students"] else f"{row['n']} of {crossed}"


def points(value: Any, sign: str = "") -> str:
    """Return a fraction as hundredths."""
    if pd.isna(value):
        return NONE
    rounded = round(100 * value, 1) or 0.0  # never −0.0
    return f"{rounded:{sign if rounded else ''}.1f}".replace("-", "−")


def number(value: Any, unit: int = 1, digits: int = 1) -> str:
    """Return a number with its unit."""
    return NONE if pd.isna(value) else f"{value / unit:,.{digits}f}"


def size(value: Any, unit: str = "B") -> str:
    """Return an amount with a decimal prefix: 24.6 kB, 5.67 GB, 1.2 TFLOP."""
    if pd.isna(value):
        return NONE
    amount, power = float(value), 0
    while abs(amount) >= 999.5 and power < len(_PREFIXES) - 1:
        amount, power = amount / 1000, power + 1
    return f"{amount:.3g} {_PREFIXES[power]}{unit}"


def p_value(value: Any) -> str:
    """Return a p-value."""
    return NONE if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
