"""Sections of a report: the rows of one dataset under one recipe of students."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.records.comparability import shorten
from wmdd.report.format import Row
from wmdd.report.recipes import DATA, RecipeOfStudents

if TYPE_CHECKING:
    from wmdd.report.collect import Report

REGIMES = ("hard", "budget", "stored", "soft")
"""Label regimes in the order of what their labels cost."""
VIEWS = {"epochs": "", "updates": ", fixed updates", "plain": ", no augmentation"}
"""Views in the order in which they are shown, and what the name of a setting ends with."""


@dataclass(frozen=True)
class ReportSection:
    """What was measured on one dataset under one recipe."""

    name: str
    """Short name, unique in the report: dataset, further what tells it from others of that name, and the recipe."""
    title: str
    """The name with classes and resolution."""
    recipe: RecipeOfStudents
    rows: list[Row]
    """Rows of ``aggregate.accuracy``, in the order of settings, the best method of each setting first."""

    @property
    def students(self) -> list[Row]:
        """Its rows without those of teachers."""
        return [row for row in self.rows if not pd.isna(row["ipc"])]

    @property
    def facts(self) -> str:
        """What a reader of its accuracies must know: the chance level and the number of test images, where known."""
        classes = {row["classes"] for row in self.students if not pd.isna(row["classes"])}
        said = [f"{count} classes: guessing gives about {100 / count:.3g} %" for count in sorted(classes)]
        counts = {row["recipe"].get("test_images") for row in self.students}
        said += [f"{count:,} test images" for count in counts if count and len(counts) == 1]
        return "; ".join(said)

    @property
    def differing(self) -> str:
        """What tells its recipe from the others of the same dataset."""
        keys = (f"{key.replace('_', ' ')} {shorten(value)}" for key, value in self.recipe.differing.items())
        return ", ".join(keys)


@functools.lru_cache(maxsize=1)
def sections(report: "Report") -> list[ReportSection]:
    """Return the sections by dataset and recipe; a teacher stands in the first one that learned from it."""
    rows = report.accuracy.to_dict("records")
    by_data: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_data.setdefault((row["dataset"], row["resolution"]), []).append(row)
    made = []
    for (dataset, resolution), own in sorted(by_data.items(), key=str):
        classes = sorted({row["classes"] for row in own if not pd.isna(row["classes"])})
        for count in classes or [None]:
            here = [row for row in own if row["classes"] == count or pd.isna(row["classes"])]
            title = ", ".join([*([f"{count} classes"] if count else []), f"{resolution} px"])
            twins = {key for key in by_data if key[0] == dataset}
            name = dataset if len(twins) == len(classes or [0]) == 1 else f"{dataset} ({title})"
            made += _by_recipe(name, f"{dataset} ({title})", here, report.recipes)
    return [one for one in made if one.rows]


def _by_recipe(name: str, title: str, rows: list[Row], recipes: list[RecipeOfStudents]) -> list[ReportSection]:
    students = [row for row in rows if not pd.isna(row["ipc"])]
    names = list(dict.fromkeys(sorted(row["recipe_name"] for row in students))) or [""]
    teachers = [row for row in rows if pd.isna(row["ipc"])]
    made = []
    for letter in names:
        own = sorted((row for row in students if row["recipe_name"] == letter), key=_order)
        known = {row["teacher"] for row in own}
        last = letter == names[-1]
        mine = [one for one in teachers if last or one["teacher"] in known]
        teachers = [one for one in teachers if one not in mine]
        data = tuple(own[0][key] for key in DATA) if own else ()
        recipe = next(
            (one for one in recipes if (one.data, one.name) == (data, letter)), RecipeOfStudents(data, letter)
        )
        suffix = f", recipe {letter}" if letter else ""
        made.append(ReportSection(f"{name}{suffix}", f"{title}{suffix}", recipe, [*own, *mine]))
    return made


def _order(row: Row) -> tuple[Any, ...]:
    regime, view = REGIMES.index(row["regime"]), list(VIEWS).index(row["view"])
    return view, row["network"], row["ipc"], regime, -row["top1"], row["baseline"]


def settings(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows of students by view, network, IPC and label regime, in this order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=_order):
        found.setdefault((row["view"], row["network"], row["ipc"], row["regime"]), []).append(row)
    return found
