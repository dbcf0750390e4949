"""``wmdd bench compare``: the same methods under two recipes or two precisions, with a test of equivalence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from wmdd.errors import InputError
from wmdd.records.comparability import shorten
from wmdd.records.power import Equivalence, equivalence
from wmdd.report import recipes as recipe_effects
from wmdd.report.aggregate import where
from wmdd.report.collect import collect
from wmdd.report.comparison import SETTING
from wmdd.report.format import NONE, p_value, points, with_interval
from wmdd.report.recipes import RecipeEffect


@dataclass(frozen=True)
class TestedEffect:
    """An effect of the recipe, with a test of equivalence."""

    effect: RecipeEffect
    equivalent: Equivalence | None
    """Result of the test of equivalence; None without a margin or with too few sets"""


def effects(
    first: Path, second: Path, margin: float | None = None
) -> tuple[list[TestedEffect], dict[str, tuple[str, str]]]:
    """Compare two measurements of the same methods in the same settings.

    Args:
        first: file of records, or folder of runs.
        second: another file or folder.
        margin: largest difference that does not matter, as a fraction; None for no test of equivalence.

    Returns:
        The effects, and the differing keys of the recipes with their values in the first shared setting.

    Raises:
        InputError: a file or folder contains no results, one holds several recipes, or the two share no method in any
            setting.
    """
    one, other = (_rows(place) for place in (first, second))
    shared = [key for key in one if key in other]
    if not shared:
        raise InputError(f"{first} and {second}: share no method in any setting (data, IPC, network, labels, view)")
    found = [recipe_effects.effect(one[key], other[key]) for key in shared]
    differing: dict[str, tuple[str, str]] = {}
    for effect in found:
        for name, (before, after) in effect.differing.items():
            differing.setdefault(name, (shorten(before), shorten(after)))
    return [TestedEffect(effect, _tested(effect, margin)) for effect in found], differing


def _rows(place: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    report = collect([place])
    recipe_effects.one_recipe(report.recipes, place)
    rows = [row for row in report.accuracy.to_dict("records") if row["ipc"] == row["ipc"]]
    return {(*(row[key] for key in SETTING), row["method"]): row for row in rows}


def _tested(effect: RecipeEffect, margin: float | None) -> Equivalence | None:
    return equivalence(effect.found, margin) if margin is not None and effect.scope == "sets" else None


def print_effects(
    found: list[TestedEffect], differing: dict[str, tuple[str, str]], margin: float | None, console: Console
) -> None:
    """Print a line for each method and setting, and what differs between the recipes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Setting", overflow="fold")
    table.add_column("Method")
    for head in ("Sets", "First − second, points", "p", *(["p, TOST", "Verdict"] if margin is not None else [])):
        table.add_column(head, justify="right")
    for tested in found:
        one = tested.effect
        text, p = points(one.found.mean, "+"), NONE
        if one.scope != "none":
            text = with_interval(one.found.mean, *one.found.bounds()) + " (this set only)" * (one.scope == "this set")
            p = p_value(one.found.p) if one.scope == "sets" else NONE
        cells = [f"{one.sets[0]}, paired" if one.shared else f"{one.sets[0]} / {one.sets[1]}", text, p]
        if margin is not None:
            cells += [p_value(tested.equivalent.p) if tested.equivalent else NONE, verdict(tested)]
        table.add_row(where(one.setting), one.method, *cells)
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


def verdict(one: TestedEffect) -> str:
    """Return the result of a comparison with a margin."""
    if one.equivalent is None:
        return "too few sets"
    if one.equivalent.holds:
        return "equivalent"
    return "different" if one.effect.found.p <= 0.05 else "not decided"
