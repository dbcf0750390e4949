"""A report on a terminal, as Markdown, as CSV and as LaTeX."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from wmdd.compared import headlines
from wmdd.spent import coverage_line
from wmdd.tables import tables
from wmdd.words import Table, caption, shared_columns

if TYPE_CHECKING:
    from rich.console import Console

    from wmdd.report import Report

MAX_HEADLINES = 12
"""Results in words at the top; more of them are read in the table."""
MAX_ROWS = 20
"""Rows of coverage and cost on a terminal."""

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$",
    "·": r"$\cdot$", "λ": r"$\lambda$", "“": "``", "”": "''", "<": "$<$", ">": "$>$", "²": r"$^2$",
}  # fmt: skip


def terminal(report: "Report", console: "Console") -> None:
    """Print the report, without provenance, on a rich console; what a whole column shares goes below the table."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    for where, method, result in headlines(report)[:MAX_HEADLINES]:
        console.print(Text(f"{where}: "), Text(method, style="bold"), Text(result), sep=" ")
    shown = tables(report)
    for table in shown:
        if table.title == "Provenance":
            continue
        shared = shared_columns(table)
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        grid.collapse_padding = True
        rows = table.rows
        if len(rows) > MAX_ROWS and table.title in ("Coverage", "Cost"):
            rows = [*rows[: MAX_ROWS - 1], rows[-1]]
        for index, column in enumerate(table.columns):
            if index not in shared:
                words = index < table.words
                # A narrow terminal breaks between words and never inside one; the last columns give way first.
                longest = max(len(word) for cell in [column, *(row[index] for row in rows)] for word in cell.split())
                grid.add_column(column, justify="left" if words else "right", min_width=longest if words else None)
        for row in rows:
            grid.add_row(*(Text(cell) for index, cell in enumerate(row) if index not in shared))
        below = [f"{table.columns[index]}: {table.rows[0][index]}." for index in shared]
        if left := len(table.rows) - len(rows):
            below.insert(0, f"{left} more rows are in the page (--html).")
        console.print(grid, Text(f"{caption(table, below)}\n", style="dim"))
    if not any(table.title == "Coverage" for table in shown) and (line := coverage_line(report)):
        console.print(Text(line, style="dim"))
    for problem in report.problems:
        console.print(Text(problem, style="yellow"))


def markdown(report: "Report") -> str:
    """Return the report as Markdown, tables and problems."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

    results = headlines(report)[:MAX_HEADLINES]
    parts = ["\n".join(f"- {where}: **{method}** {result}" for where, method, result in results), coverage_line(report)]
    for table in tables(report):
        rule = [":--" if index < table.words else "--:" for index in range(len(table.columns))]
        lines = [line(table.columns), line(rule), *map(line, table.rows)]
        parts += [f"## {table.title}", caption(table), "\n".join(lines)]
    if report.problems:
        parts += ["## Problems", "\n".join(f"- {problem}" for problem in report.problems)]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(report: "Report") -> str:
    """Return the tables as LaTeX floats that need the package ``booktabs``; what a whole column shares is a caption."""
    return "\n".join(_latex(table) for table in tables(report) if table.title != "Provenance")


def _latex(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return "  " + " & ".join(map(_tex, cells)) + r" \\"

    shared = shared_columns(table)
    kept = [index for index in range(len(table.columns)) if index not in shared]
    align = "".join("l" if index < table.words else "r" for index in kept)
    below = [f"{table.columns[index]}: {table.rows[0][index]}." for index in shared]
    return "\n".join(
        [
            r"\begin{table}",
            rf"  \caption{{{_tex(caption(table, below))}}}",
            rf"  \label{{tab:{table.id}}}",
            r"  \centering",
            rf"  \begin{{tabular}}{{{align}}}",
            r"  \toprule",
            line(table.columns[index] for index in kept),
            r"  \midrule",
            *(line(row[index] for index in kept) for row in table.rows),
            r"  \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def csv(report: "Report") -> str:
    """Return accuracies as CSV, fractions at full precision, each key of the recipe in a column; or else the speeds."""
    if report.accuracy.empty and report.speeds:
        rows = [{"run": run.label, **speed.model_dump(mode="json")} for run, speed in report.speeds]
        return str(pd.json_normalize(rows).to_csv(index=False))
    frame = report.accuracy.drop(columns=["recipe", "origins"])
    recipes = pd.DataFrame(list(report.accuracy["recipe"]), index=frame.index)
    return str(frame.join(recipes.add_prefix("recipe.")).to_csv(index=False))
