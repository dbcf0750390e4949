"""Tables of text, and numbers as words: accuracies in percent, amounts with prefixes, – for what is not known."""

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from wmdd.records import shorten

NONE = "–"

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_UNITS = {"checkpoint": "epoch", "resolution": "px"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table ready to print."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    words: int = 1
    """Leading columns that hold words; the others hold numbers."""
    tail: int = 0
    """Trailing columns that hold words as well."""
    setting: int = 0
    """Leading columns that say what rows have in common before they differ: a page makes them headings."""
    terms: dict[str, str] = field(default_factory=dict)
    """What all rows share."""
    origins: list[list[dict[str, str]]] = field(default_factory=list)
    """Where the numbers of each row come from; empty where the caption says it."""

    def is_number(self, index: int) -> bool:
        """Return whether a column holds numbers."""
        return self.words <= index < len(self.columns) - self.tail

    @property
    def id(self) -> str:
        """A name for anchors."""
        return self.title.lower().replace(" ", "-")


def trimmed(table: Table) -> Table:
    """Return the table without the columns that say nothing in any row."""
    kept = [i for i in range(len(table.columns)) if any(row[i] != NONE for row in table.rows)]
    return replace(
        table,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
        words=sum(i < table.words for i in kept),
        tail=sum(i >= len(table.columns) - table.tail for i in kept),
        setting=sum(i < table.setting for i in kept),
    )


def folded(table: Table) -> Table:
    """Return the table with the columns of words in which all of several rows agree moved to what all rows share."""
    values = [{row[i] for row in table.rows} for i in range(table.words)]
    alike = [i for i, found in enumerate(values) if len(found) == 1 < len(table.rows)]
    return replace(
        table,
        columns=[column for i, column in enumerate(table.columns) if i not in alike],
        rows=[[cell for i, cell in enumerate(row) if i not in alike] for row in table.rows],
        words=table.words - len(alike),
        setting=sum(i not in alike for i in range(table.setting)),
        terms={table.columns[i].lower(): table.rows[0][i] for i in alike} | table.terms,
    )


def caption(table: Table) -> str:
    """Return the caption with what all rows share."""
    terms = ", ".join(f"{key} {value}" for key, value in table.terms.items())
    return f"{table.caption} Shared by all rows: {terms}." if terms else table.caption


def percent(row: Row, metric: str) -> str:
    """Return an accuracy in percent with its interval."""
    mean, half_width = row[metric], row[f"{metric}_half_width"]
    if pd.isna(mean):
        return NONE
    return f"{100 * mean:.1f}" if pd.isna(half_width) else f"{100 * mean:.1f} ± {100 * half_width:.1f}"


def difference(row: Row, prefix: str = "") -> str:
    """Return a difference in points with its interval: to the baseline, or with ``coreset_`` to the coreset."""
    value, low, high = (row[f"{prefix}{key}"] for key in ("difference", "low", "high"))
    if pd.isna(value):
        return NONE
    text = f"{100 * value:+.1f}"
    if not pd.isna(low):
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text.replace("-", "−")


def count(row: Row) -> str:
    """Return distinct distilled sets × students of each."""
    if pd.isna(row["sets"]):
        return str(row["n"])
    crossed = f"{row['sets']}×{row['students']}"
    return crossed if row["n"] == row["sets"] * row["students"] else f"{row['n']} of {crossed}"


def points(value: Any, sign: str = "") -> str:
    """Return a fraction as hundredths."""
    return NONE if pd.isna(value) else f"{100 * value:{sign if value else ''}.1f}".replace("-", "−")


def number(value: Any, unit: int = 1, digits: int = 1) -> str:
    """Return a number of so many units."""
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


def term(key: str, value: Any) -> str:
    """Return a setting's value in words."""
    if value is None or value != value:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join([shorten(value), *([_UNITS[key]] if key in _UNITS else [])])
