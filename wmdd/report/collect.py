"""Measurements consolidated: what was found, what is missing, what it cost and where each number comes from.

``collect`` reads the places once; the same report then goes to a terminal, to Markdown, CSV or LaTeX (``text``), or
into one HTML page (``html``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wmdd.records.schema import SpeedRecord
from wmdd.report import aggregate, published
from wmdd.report.recipes import RecipeOfStudents
from wmdd.report.robustness import robustness
from wmdd.report.runs import Run, read
from wmdd.report.text import terminal as render_terminal

__all__ = ["Report", "collect", "render_terminal"]


@dataclass(frozen=True, eq=False)
class Report:
    """The consolidated runs; accuracies are fractions, costs seconds."""

    runs: list[Run]
    students: pd.DataFrame
    """The students that count (``aggregate.students``)."""
    accuracy: pd.DataFrame
    """``aggregate.accuracy``: a row for each setting and method, then for each teacher."""
    recipes: list[RecipeOfStudents]
    """Recipes of the students, by data and name."""
    robustness: pd.DataFrame
    speeds: list[tuple[Run, SpeedRecord]]
    published: list[published.PublishedAccuracy]
    """Figures from the literature for the data sets of the report."""
    coverage: pd.DataFrame
    cost: pd.DataFrame
    provenance: pd.DataFrame
    problems: list[str]
    """What could not be read or does not count, one sentence each."""


def collect(places: Sequence[Path]) -> Report:
    """Read run folders with their baselines, folders of these, sweeps (their best run), protocols, files of records
    and folders of such files.

    Raises:
        InputError: a place holds nothing to report, unlike measurements would be averaged, or a file of published
            figures is wrong.
    """
    problems: list[str] = []
    runs, waiting = read(places, problems)
    students, recipes = aggregate.students(runs, problems)
    accuracy = aggregate.accuracy(students, runs)
    speeds = aggregate.speeds(runs, problems)
    datasets = set(accuracy["dataset"])
    return Report(
        runs=runs,
        students=students,
        accuracy=accuracy,
        recipes=recipes,
        robustness=robustness(accuracy),
        speeds=speeds,
        published=[figure for figure in published.load() if figure.dataset in datasets] if datasets else [],
        coverage=aggregate.coverage(runs, waiting),
        cost=aggregate.cost(runs),
        provenance=aggregate.provenance(students, runs, speeds),
        problems=problems,
    )
