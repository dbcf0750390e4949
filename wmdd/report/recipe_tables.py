"""The table of what a recipe of students changes."""

from typing import TYPE_CHECKING, Any

from wmdd.records.comparability import shorten
from wmdd.report.format import NONE, p_value, points, with_interval
from wmdd.report.recipes import RecipeEffect, adjusted, effects
from wmdd.report.table import Table

if TYPE_CHECKING:
    from wmdd.report.collect import Report

_WORDS = ("Data set", "Recipes", "What differs", "Network", "View", "Method", "IPC", "Labels")
MAX_KEYS = 4
"""Keys of a recipe that are told in words; recipes that differ in more are read in the accuracy tables."""


def effect_of_the_recipe(report: "Report") -> Table:
    """Return what each further recipe changes against A, method by method, adjusted within each pair of recipes."""
    families: dict[tuple[Any, ...], list[RecipeEffect]] = {}
    for one in effects(report.accuracy, report.recipes):
        families.setdefault((*one.setting[:3], one.names), []).append(one)
    lines = [
        _line(one, p, bounds) for own in families.values() for one, (p, bounds) in zip(own, adjusted(own), strict=True)
    ]
    return Table(
        title="Effect of the recipe",
        caption=(
            "Points that the second recipe gives more than the first, for the same method and setting. Paired: only"
            " the images that both recipes share are compared, in pairs; otherwise all sets, by Welch's t-test."
            " First and second: top-1 means of exactly the compared sets, so they can differ from the other tables."
            " p and interval are adjusted by Holm within each pair of recipes. Averages are never taken across recipes."
        ),
        columns=[*_WORDS, "First, %", "Second, %", "Second − first, points", "p", "Sets, first / second"],
        rows=lines,
        words=len(_WORDS),
        setting=5,
    )


def _line(one: RecipeEffect, p: float, bounds: tuple[float, float]) -> list[str]:
    dataset, classes, resolution, ipc, network, regime, view = one.setting
    text = with_interval(one.found.mean, *bounds) if one.scope != "none" else points(one.found.mean, "+")
    text += " (this set only)" * (one.scope == "this set")
    sets = f"{one.sets[0]}, paired" if one.shared else f"{one.sets[1]} / {one.sets[0]}"
    where = f"{dataset} ({classes} classes, {resolution} px)"
    names = f"{one.names[1]} → {one.names[0]}"
    figures = [points(one.means[1]), points(one.means[0]), text, p_value(p), sets]
    return [where, names, _differing(one), network, view, one.method, str(ipc), regime, *figures]


def _differing(one: RecipeEffect) -> str:
    told = [
        f"{key.replace('_', ' ')} {shorten(before)} → {shorten(after)}"
        for key, (after, before) in one.differing.items()
        if key not in ("test_images", "updates")
    ]
    return "; ".join(told[:MAX_KEYS]) + (f" and {len(told) - MAX_KEYS} more" if len(told) > MAX_KEYS else "") or NONE
