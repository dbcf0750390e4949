"""``wmdd bench compare``: the same methods under two recipes or two precisions, with a test of equivalence."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from wmdd.errors import InputError
from wmdd.records.comparability import shorten
from wmdd.records.intervals import Difference, paired
from wmdd.records.power import Equivalence, equivalence
from wmdd.records.set_samples import Scope, compared
from wmdd.report.aggregate import where
from wmdd.report.collect import collect
from wmdd.report.comparison import SETTING, sample_of_values
from wmdd.report.format import NONE, p_value, points


@dataclass(frozen=True)
class RecipeEffect:
    """One method in one setting, measured twice."""

    setting: str
    method: str
    found: Difference
    """First minus second."""
    scope: Scope
    shared: bool
    """Whether both were measured on the same images: differences are then paired by set, otherwise not."""
    sets: tuple[int, int]
    """Number of distilled sets, first and second"""
    equivalent: Equivalence | None
    """Result of the test of equivalence; None without a margin or with too few sets"""


def effects(
    first: Path, second: Path, margin: float | None = None
) -> tuple[list[RecipeEffect], dict[str, tuple[str, str]]]:
    """Compare two measurements of the same methods in the same settings.

    Args:
        first: file of records, or folder of runs.
        second: another file or folder.
        margin: largest difference that does not matter, as a fraction; None for no test of equivalence.

    Returns:
        The effects, and the differing keys of the recipes with their values in the first shared setting.

    Raises:
        InputError: a file or folder contains no results, or the two share no method in any setting.
    """
    one, other = (_rows(place) for place in (first, second))
    shared = [key for key in one if key in other]
    if not shared:
        raise InputError(f"{first} and {second}: share no method in any setting (data, IPC, network, labels, view)")
    differing: dict[str, tuple[str, str]] = {}
    for key in shared:
        recipes = [rows[key]["recipe"] for rows in (one, other)]
        for name in {**recipes[0], **recipes[1]}:
            pair = recipes[0].get(name), recipes[1].get(name)
            if pair[0] != pair[1]:
                differing.setdefault(name, (shorten(pair[0]), shorten(pair[1])))
    return [_effect(key, one[key], other[key], margin) for key in shared], differing


def _rows(place: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [row for row in collect([place]).accuracy.to_dict("records") if row["ipc"] == row["ipc"]]
    return {(*(row[key] for key in SETTING), row["method"]): row for row in rows}


def _effect(key: tuple[Any, ...], one: dict[str, Any], other: dict[str, Any], margin: float | None) -> RecipeEffect:
    images = [{images for images, _ in row["values"]} for row in (one, other)]
    sets = len(images[0]), len(images[1])
    fixed = bool(one["fixed"] and other["fixed"])
    shared = images[0] == images[1] and (len(images[0]) > 1 or fixed)
    if shared:
        # A selection without random choices has one set: its students of one seed are pairs. Else the pairs are the
        # means of each set.
        keys = [sorted(row["values"]) for row in (one, other)]
        units = sorted(set(keys[0]) & set(keys[1])) if fixed else [(name, None) for name in sorted(images[0])]
        values = [[_mean(row["values"], unit) for unit in units] for row in (one, other)]
        found = paired(*values) if units else Difference(one["top1"] - other["top1"])
        scope: Scope = "sets" if found.error > 0 and found.freedom >= 2 else "none"
    else:
        found, scope = compared(*(sample_of_values(row["values"], row["fixed"]) for row in (one, other)))
    tested = equivalence(found, margin) if margin is not None and scope == "sets" else None
    return RecipeEffect(where(key[:-1]), key[-1], found, scope, shared, sets, tested)


def _mean(values: dict[tuple[str, int], float], unit: tuple[str, int | None]) -> float:
    return fmean(value for (images, seed), value in values.items() if images == unit[0] and unit[1] in (None, seed))


def print_effects(
    found: list[RecipeEffect], differing: dict[str, tuple[str, str]], margin: float | None, console: Console
) -> None:
    """Print a line for each method and setting, and what differs between the recipes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Setting", overflow="fold")
    table.add_column("Method")
    for head in ("Sets", "First − second, points", "p", *(["p, TOST", "Verdict"] if margin is not None else [])):
        table.add_column(head, justify="right")
    for one in found:
        text, p = points(one.found.mean, "+"), NONE
        if one.scope != "none":
            text += f" [{', '.join(map(points, one.found.bounds()))}]" + " (this set only)" * (one.scope == "this set")
            p = p_value(one.found.p) if one.scope == "sets" else NONE
        cells = [f"{one.sets[0]}, paired" if one.shared else f"{one.sets[0]} / {one.sets[1]}", text, p]
        if margin is not None:
            cells += [p_value(one.equivalent.p) if one.equivalent else NONE, verdict(one)]
        table.add_row(one.setting, one.method, *cells)
    console.print(table)
    keys = "; ".join(f"{key}: {pair[0]} and {pair[1]}" for key, pair in differing.items())
    console.print(f"Recipes differ in: {keys}." if keys else "The recipes of the students are equal.", markup=False)
    console.print("Intervals (95 %) and p are over distilled sets, not adjusted for several comparisons.", markup=False)
    if margin is not None:
        console.print(
            f"Equivalent: two one-sided tests at 5 % show a difference below {100 * margin:g} points. Choose the margin"
            " before the measurement. Not decided is no evidence of equivalence.",
            markup=False,
        )


def verdict(one: RecipeEffect) -> str:
    """Return the result of a comparison with a margin."""
    if one.equivalent is None:
        return "too few sets"
    if one.equivalent.holds:
        return "equivalent"
    return "different" if one.found.p <= 0.05 else "not decided"
