"""Recipes of students: a report holds several, names them by letters and never averages across them."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd

from wmdd.errors import InputError
from wmdd.records.comparability import complete
from wmdd.records.convergence import base_view
from wmdd.records.intervals import LEVEL, Difference, adjusted_together, paired
from wmdd.records.set_samples import FEWEST, Scope, compared
from wmdd.report.comparison import COMPARABLE, SETTING, sample_of_values, several_teachers
from wmdd.storage.files import digest, flatten

if TYPE_CHECKING:
    from wmdd.records.schema import Record

DATA = ["dataset", "classes", "resolution"]
"""What recipes are named for: B of one dataset is another recipe than B of the next."""
_LENGTH = ("epochs", "updates")


@dataclass(frozen=True)
class RecipeOfStudents:
    """One of several recipes under which students of the same data were trained."""

    data: tuple[Any, ...]
    """Dataset, number of classes and resolution."""
    name: str
    """A, B, C, ... by the number of students; empty where there is one recipe."""
    differing: dict[str, Any] = field(default_factory=dict)
    """Its values of the keys in which the recipes of the data differ within a setting."""

    @property
    def held_out(self) -> bool:
        """Whether its students were measured on held-out images."""
        return self.differing.get("evaluated_on") == "holdout"


def named(students: pd.DataFrame) -> tuple[list[str], list[RecipeOfStudents]]:
    """Return the name of the recipe of each student, and the recipes by data and name.

    Students of one setting whose recipes differ are of two recipes. Teachers are no difference where every distilled
    set has one of its own.

    Args:
        students: a row for each student: ``SETTING``, ``record``, ``distillation_seed`` and ``teacher``.
    """
    names = pd.Series("", index=students.index)
    recipes: list[RecipeOfStudents] = []
    for data, group in students.groupby(DATA):
        conditions = _conditions(group)
        keys = _differing(group, conditions)
        if not keys:
            recipes.append(RecipeOfStudents(data, ""))
            continue
        variants = {index: tuple(one.get(key) for key in keys) for index, one in conditions.items()}
        counts = Counter(variants.values()).most_common()
        letters = {variant: _letter(number) for number, (variant, _) in enumerate(counts)}
        names.update(pd.Series({index: letters[variant] for index, variant in variants.items()}))
        recipes += [RecipeOfStudents(data, letters[one], dict(zip(keys, one, strict=True))) for one, _ in counts]
    return list(names), recipes


def _conditions(group: pd.DataFrame) -> dict[Hashable, dict[str, Any]]:
    """Return what must agree of each student before it is averaged with another."""
    cached: dict[str, dict[str, Any]] = {}
    found: dict[Hashable, dict[str, Any]] = {}
    rows: list[Record] = list(group["record"])
    for index, record in zip(group.index, rows, strict=True):
        place = f"{record.recipe}{record.evaluated_on}{record.view}"
        if place not in cached:
            flat = {**flatten(complete(record.recipe)), "evaluated_on": record.evaluated_on}
            if record.view != base_view(record.view):  # of the view of half the length, beside which it stands
                flat |= {key: flat[key] / 2 for key in _LENGTH if isinstance(flat.get(key), int)}
            cached[place] = flat
        found[index] = cached[place]
    without = {index: digest({**one, "teacher": None}) for index, one in found.items()}
    for _, part in group.assign(without=pd.Series(without)).groupby([*SETTING, "without"]):
        if several_teachers(part):
            found |= {index: {**found[index], "teacher": "one for each set"} for index in part.index}
    return found


def _differing(group: pd.DataFrame, conditions: Mapping[Hashable, dict[str, Any]]) -> list[str]:
    keys: dict[str, None] = {}
    for _, own in group.groupby(SETTING):
        distinct = list({id(conditions[index]): conditions[index] for index in own.index}.values())
        for key in dict.fromkeys(key for one in distinct for key in one):
            if len({str(one.get(key)) for one in distinct}) > 1:
                keys[key] = None
    if "updates" in keys and keys.keys() & {"epochs", "batch_size"}:
        del keys["updates"]  # they follow from these, and change with IPC
    return list(keys)


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"R{number + 1}"


@dataclass(frozen=True)
class RecipeEffect:
    """One method in one setting, measured under two recipes."""

    setting: tuple[Any, ...]
    """Values of ``SETTING``."""
    method: str
    names: tuple[str, str]
    """Names of the recipes."""
    means: tuple[float, float]
    """Mean top-1 of exactly the sets that are compared, first and second."""
    found: Difference
    """First minus second."""
    scope: Scope
    shared: bool
    """Whether both were measured on the same images, at least three sets: differences are then paired by set."""
    sets: tuple[int, int]
    """Number of distilled sets, first and second; of pairs, their number twice."""
    differing: dict[str, tuple[Any, Any]]
    """Keys of the recipes that differ, with both values."""


def effect(one: Mapping[str, Any], other: Mapping[str, Any]) -> RecipeEffect:
    """Compare two rows of ``aggregate.accuracy`` of one method in one setting."""
    images = [{images for images, _ in row["values"]} for row in (one, other)]
    fixed = bool(one["fixed"] and other["fixed"])
    both = images[0] & images[1]
    means = float(one["top1"]), float(other["top1"])
    shared = len(both) >= FEWEST or (images[0] == images[1] and (len(both) > 1 or fixed))
    if shared:
        # A selection without random choices has one set: its students of one seed are pairs. Else the pairs are the
        # means of each set.
        keys = [sorted(row["values"]) for row in (one, other)]
        units = sorted(set(keys[0]) & set(keys[1])) if fixed else [(name, None) for name in sorted(both)]
        values = [[_mean(row["values"], unit) for unit in units] for row in (one, other)]
        means = (fmean(values[0]), fmean(values[1])) if units else means
        found = paired(*values) if units else Difference(means[0] - means[1])
        scope: Scope = "sets" if found.error > 0 and found.freedom >= 2 else "none"
    else:
        found, scope = compared(*(sample_of_values(row["values"], row["fixed"]) for row in (one, other)))
    recipes = complete(one["recipe"]), complete(other["recipe"])
    pairs = {key: (recipes[0].get(key), recipes[1].get(key)) for key in {**recipes[0], **recipes[1]}}
    return RecipeEffect(
        tuple(one[key] for key in SETTING),
        one["method"],
        (one["recipe_name"], other["recipe_name"]),
        means,
        found,
        scope,
        shared,
        (len(both), len(both)) if shared else (len(images[0]), len(images[1])),
        {key: pair for key, pair in pairs.items() if pair[0] != pair[1]},
    )


def effects(accuracy: pd.DataFrame, recipes: list[RecipeOfStudents]) -> list[RecipeEffect]:
    """Return the effect of each further recipe against A, for the methods and settings that both have.

    Recipes that were measured on other images are not compared.
    """
    rows = [row for row in accuracy.to_dict("records") if not pd.isna(row["ipc"])]
    cells = {(*(row[key] for key in COMPARABLE), row["method"]): row for row in rows}
    found = []
    for first, second in _pairs(recipes):
        for row in rows:
            if (*(row[key] for key in DATA), row["recipe_name"]) == (*second.data, second.name):
                base = cells.get((*(row[key] for key in SETTING), first.name, row["method"]))
                if base is not None:
                    found.append(effect(row, base))
    return found


def _pairs(recipes: list[RecipeOfStudents]) -> Iterator[tuple[RecipeOfStudents, RecipeOfStudents]]:
    by_data: dict[tuple[Any, ...], list[RecipeOfStudents]] = {}
    for one in recipes:
        by_data.setdefault(one.data, []).append(one)
    for own in by_data.values():
        yield from ((own[0], other) for other in own[1:] if other.held_out == own[0].held_out)


def adjusted(effects_of_family: list[RecipeEffect]) -> list[tuple[float, tuple[float, float]]]:
    """Return p and interval of each effect, adjusted by Holm for all that have a p-value; NaN where there is none."""
    by_number = adjusted_together(
        {number: one.found.p for number, one in enumerate(effects_of_family) if one.scope == "sets"}
    )
    untested = float("nan"), LEVEL
    levels = [by_number.get(number, untested) for number in range(len(effects_of_family))]
    return [(p, one.found.bounds(level)) for one, (p, level) in zip(effects_of_family, levels, strict=True)]


def one_recipe(recipes: list[RecipeOfStudents], place: Any) -> None:
    """Refuse a place that holds several recipes of one setting.

    Raises:
        InputError: it does; the message names the keys that differ.
    """
    several = [one for one in recipes if one.name]
    if several:
        keys = ", ".join(several[0].differing)
        raise InputError(
            f"{place}: holds students of {len(several)} recipes ({keys} differ); name a place of one recipe"
        )


def _mean(values: Mapping[tuple[str, int], float], unit: tuple[str, int | None]) -> float:
    return fmean(value for (images, seed), value in values.items() if images == unit[0] and unit[1] in (None, seed))
