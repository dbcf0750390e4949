"""Tables of a report."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from wmdd.records.comparability import shorten
from wmdd.report.format import NONE, UNITS


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
    section: str = ""
    """Section of the report, where there are several tables of this title."""
    marks: dict[tuple[int, str], str] = field(default_factory=dict)
    """Marks of cells by row and column: ``best`` of its setting, or ``tie`` with it."""
    heat: dict[tuple[int, str], float] = field(default_factory=dict)
    """Colours of cells by row and column, from −1 to 1."""
    optional: frozenset[str] = frozenset()
    """Columns that a page hides until they are asked for."""

    def is_number(self, index: int) -> bool:
        """Return whether a column holds numbers."""
        return self.words <= index < len(self.columns) - self.tail

    @property
    def id(self) -> str:
        """A name for anchors."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.title} {self.section}".lower()).strip("-")

    @property
    def heading(self) -> str:
        """The title with the section."""
        return f"{self.title}: {self.section}" if self.section else self.title


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


def term(key: str, value: Any) -> str:
    """Return a setting's value in words."""
    if value is None or value != value:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join([shorten(value), *([UNITS[key]] if key in UNITS else [])])
