"""A report on a terminal, as Markdown, as CSV and as LaTeX."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from wmdd.report.collect_tables import tables
from wmdd.report.cost_tables import coverage_line
from wmdd.report.gaps import gaps
from wmdd.report.table import Table, caption, folded
from wmdd.report.verdict import Verdict, summary, verdicts

if TYPE_CHECKING:
    from rich.console import Console

    from wmdd.report.collect import Report

MAX_ROWS = 30
"""Rows of a table on a terminal, except for accuracies."""
MAX_FLOAT = 40
"""Rows of a LaTeX float; a longer table breaks over pages."""

MAX_PROBLEMS = 30
"""Problems that are told one by one."""

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$",
    "·": r"$\cdot$", "λ": r"$\lambda$", "“": "``", "”": "''", "<": "$<$", ">": "$>$", "²": r"$^2$",
}  # fmt: skip


def terminal(report: "Report", console: "Console") -> None:
    """Print the verdicts, then a table of each section and what else the page holds, on a rich console."""
    from rich.text import Text

    found = verdicts(report)
    for sentence in summary(found):
        console.print(sentence)
    for verdict in found:
        first, *rest = verdict.sentences()
        place = Text(f"{verdict.section.title}, {verdict.setting}: ", style="dim")
        console.print(
            place.append(f"{first}.", style="not dim bold").append("".join(f" {one}." for one in rest), "not dim")
        )
    made = [folded(table) for table in tables(report)]
    shown = [table for table in made if table.title == "Accuracy"]
    shown = shown or [table for table in made if table.title in ("Throughput", "Scaling")]
    shown += [table for table in made if table.title == "Coverage"]  # which runs lack something
    for table in shown:
        _print(table, console)
    if (line := coverage_line(report)) and not any(table.title == "Coverage" for table in shown):
        console.print(Text(line, style="dim"))
    for problem in listed(report.problems):
        console.print(Text(problem, style="yellow"))
    if others := list(dict.fromkeys(table.title for table in made if table not in shown)):
        console.print(Text(f"The page (--html) also has: {', '.join(others)}, plots and images.", style="dim"))


def said(verdict: Verdict) -> str:
    """Return the sentences of a verdict as one text."""
    return ". ".join(verdict.sentences()) + "."


def _print(table: Table, console: "Console") -> None:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(title=table.heading, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    grid.collapse_padding = True
    rows = table.rows
    if len(rows) > MAX_ROWS and table.title != "Accuracy":
        rows = rows[:MAX_ROWS]
    kept = _fitting(table, rows, console.width)
    for index in kept:
        cells = [table.columns[index], *(row[index] for row in rows)]
        # Words break between words and never inside one; a figure stays on one line with its interval.
        width = None if table.is_number(index) else _longest_word(cells)
        grid.add_column(cells[0], justify="left" if width else "right", min_width=width, no_wrap=width is None)
    for number, row in enumerate(rows):
        marks = (table.marks.get((number, table.columns[index])) for index in kept)
        styles = ("bold" if mark == "best" else "underline" if mark == "tie" else "" for mark in marks)
        grid.add_row(*(Text(row[index], style) for index, style in zip(kept, styles, strict=True)))
    left = len(table.rows) - len(rows)
    below = f"{left} more rows are in the page (--html). " if left else ""
    if hidden := [column for index, column in enumerate(table.columns) if index not in kept]:
        below += f"In the page, further columns: {', '.join(hidden)}. "
    console.print(grid, Text(f"{below}{caption(table)}\n", style="dim"))


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
        if (room >= -2 and column not in table.optional) or index < table.words:
            kept.append(index)
    return kept


def _longest_word(cells: list[str]) -> int:
    return max(len(word) for cell in cells for word in cell.split())


def markdown(report: "Report") -> str:
    """Return the report as Markdown, tables and problems."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

    found = verdicts(report)
    missing = [f"- {name}: {'; '.join(phrases)}" for name, phrases in gaps(report)]
    parts = [
        " ".join(summary(found)),
        "\n".join(f"- {one.section.title}, {one.setting}: {said(one)}" for one in found),
        "\n".join(["Not measured:", "", *missing]) if missing else "",
    ]
    parts.append(coverage_line(report))
    for table in tables(report):
        rule = ["--:" if table.is_number(index) else ":--" for index in range(len(table.columns))]
        lines = [
            line(table.columns),
            line(rule),
            *(line(_bold(table, number, "**")) for number in range(len(table.rows))),
        ]
        parts += [f"## {table.heading}", caption(table), "\n".join(lines)]
    if report.problems:
        parts += ["## Problems", "\n".join(f"- {problem}" for problem in listed(report.problems))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bold(table: Table, number: int, mark: str) -> list[str]:
    """Return a row with the best accuracies between marks."""
    best = [
        table.marks.get((number, column)) == "best" and table.is_number(i) for i, column in enumerate(table.columns)
    ]
    return [f"{mark}{cell}{mark}" if bold else cell for cell, bold in zip(table.rows[number], best, strict=True)]


def latex(report: "Report") -> str:
    """Return the tables as LaTeX, which needs ``booktabs`` and, for long ones, ``longtable``.

    What a whole column shares stands in the caption.
    """
    return "\n".join(_latex(folded(table)) for table in tables(report) if table.title != "Provenance")


def _latex(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    def row(number: int) -> str:
        best = (table.marks.get((number, column)) == "best" for column in table.columns)
        cells = zip(map(_tex, table.rows[number]), best, strict=True)
        return line(rf"\textbf{{{cell}}}" if bold else cell for cell, bold in cells)

    align = "".join("r" if table.is_number(index) else "l" for index in range(len(table.columns)))
    title = rf"\caption{{{_tex(caption(table))}}}", rf"\label{{tab:{table.id}}}"
    head = [r"  \toprule", line(map(_tex, table.columns)), r"  \midrule"]
    body = list(map(row, range(len(table.rows))))
    if len(table.rows) > MAX_FLOAT:
        first = [rf"\begin{{longtable}}{{{align}}}", rf"  {title[0]}{title[1]}\\", *head, r"  \endfirsthead"]
        again = [*head, r"  \endhead", r"  \bottomrule", r"  \endfoot"]
        return "\n".join([*first, *again, *body, r"\end{longtable}", ""])
    begin = [r"\begin{table}", *(f"  {one}" for one in title), r"  \centering", rf"  \begin{{tabular}}{{{align}}}"]
    end = [r"  \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join([*begin, *head, *body, *end])


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
