"""A report on a terminal, as Markdown, as CSV and as LaTeX."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from wmdd.report.accuracy_tables import headlines
from wmdd.report.collect_tables import tables
from wmdd.report.cost_tables import coverage_line
from wmdd.report.table import Table, caption, folded

if TYPE_CHECKING:
    from rich.console import Console

    from wmdd.report.collect import Report

MAX_HEADLINES = 8
"""Results in words at the top; where there are more, the tables say it better."""
MAX_ROWS = 30
"""Rows of a table on a terminal, except for accuracies."""

MAX_PROBLEMS = 30
"""Problems that are told one by one."""

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

    for where, method, result in _results(report):
        console.print(Text(f"{where}: "), Text(method, style="bold"), Text(result), sep=" ")
    shown = [folded(table) for table in tables(report) if table.title != "Provenance"]
    for table in shown:
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        grid.collapse_padding = True
        rows = table.rows
        if len(rows) > MAX_ROWS and table.title != "Accuracy":
            rows = [*rows[: MAX_ROWS - 1], rows[-1]]  # the last of the costs is their sum
        kept = _fitting(table, rows, console.width)
        for index in kept:
            cells = [table.columns[index], *(row[index] for row in rows)]
            # Words break between words and never inside one; a figure stays on one line with its interval.
            width = None if table.is_number(index) else _longest_word(cells)
            grid.add_column(cells[0], justify="left" if width else "right", min_width=width, no_wrap=width is None)
        for row in rows:
            grid.add_row(*(Text(row[index]) for index in kept))
        left = len(table.rows) - len(rows)
        below = f"{left} more rows are in the page (--html). " if left else ""
        if hidden := [column for index, column in enumerate(table.columns) if index not in kept]:
            below += f"For want of room without: {', '.join(hidden)}. "
        console.print(grid, Text(f"{below}{caption(table)}\n", style="dim"))
    if not any(table.title == "Coverage" for table in shown) and (line := coverage_line(report)):
        console.print(Text(line, style="dim"))
    for problem in listed(report.problems):
        console.print(Text(problem, style="yellow"))


def listed(problems: list[str]) -> list[str]:
    """Return the first problems, and how many more there are."""
    left = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"and {left} more problems"] if left > 0 else problems


def _fitting(table: Table, rows: list[list[str]], room: int) -> list[int]:
    """Return the columns that fit side by side: all of the words, and figures from the left on."""
    kept = []
    for index, column in enumerate(table.columns):
        cells = [column, *(row[index] for row in rows)]
        room -= 2 + (max(map(len, cells)) if table.is_number(index) else _longest_word(cells))
        if room >= -2 or index < table.words:
            kept.append(index)
    return kept


def _longest_word(cells: list[str]) -> int:
    return max(len(word) for cell in cells for word in cell.split())


def _results(report: "Report") -> list[tuple[str, str, str]]:
    found = headlines(report)
    return found if len(found) <= MAX_HEADLINES else []


def markdown(report: "Report") -> str:
    """Return the report as Markdown, tables and problems."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

    parts = ["\n".join(f"- {where}: **{method}** {result}" for where, method, result in _results(report))]
    parts.append(coverage_line(report))
    for table in tables(report):
        rule = ["--:" if table.is_number(index) else ":--" for index in range(len(table.columns))]
        lines = [line(table.columns), line(rule), *map(line, table.rows)]
        parts += [f"## {table.title}", caption(table), "\n".join(lines)]
    if report.problems:
        parts += ["## Problems", "\n".join(f"- {problem}" for problem in listed(report.problems))]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(report: "Report") -> str:
    """Return the tables as LaTeX floats that need the package ``booktabs``; what a whole column shares is a caption."""
    return "\n".join(_latex(folded(table)) for table in tables(report) if table.title != "Provenance")


def _latex(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return "  " + " & ".join(map(_tex, cells)) + r" \\"

    align = "".join("r" if table.is_number(index) else "l" for index in range(len(table.columns)))
    return "\n".join(
        [
            r"\begin{table}",
            rf"  \caption{{{_tex(caption(table))}}}",
            rf"  \label{{tab:{table.id}}}",
            r"  \centering",
            rf"  \begin{{tabular}}{{{align}}}",
            r"  \toprule",
            line(table.columns),
            r"  \midrule",
            *map(line, table.rows),
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
    frame = report.accuracy.drop(columns=["recipe", "origins", "otherwise", "values"])
    frame["convergence"] = [None if pd.isna(one) else one.text for one in frame["convergence"]]
    recipes = pd.DataFrame(list(report.accuracy["recipe"]), index=frame.index)
    return str(frame.join(recipes.add_prefix("recipe.")).to_csv(index=False))
