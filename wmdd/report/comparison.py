"""Methods compared with each other, setting by setting."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
from wmdd.records.intervals import Difference, adjusted_together, paired
from wmdd.records.set_samples import FEWEST, Sample, Scope, compared, sample_of
from wmdd.runs.baselines import RANDOM

SETTING = ["dataset", "classes", "resolution", "ipc", "network", "regime", "view"]
"""What a record says of the setting of a student."""
COMPARABLE = [*SETTING, "recipe_name"]
"""What two methods must share to stand in one comparison: the setting, and the recipe where a report has several."""


REFERENCE = RANDOM
"""The method that the others are compared with: random real images."""


CORESET = "medoids"
"""The selection of real images that they are compared with as well, where it was measured."""

SAME = "same images"
"""Scope of a comparison of two methods that chose the same images: there is nothing to compare."""

_COMPARED = ("difference", "scope", "low", "high", "low95", "high95", "p", "p_adjusted", "detects")
_BEHIND = ("behind", "behind_scope", "behind_low", "behind_high", "behind_p", "behind_detects")
_REFERENCES = {REFERENCE: "", CORESET: "coreset_"}


@dataclass(frozen=True)
class _Cell:
    """One method, by one name, in one setting."""

    method: str
    name: str
    baseline: bool
    sets: dict[str, list[float]]
    """Top-1 of the students of each distilled set."""
    seeds: dict[int, float]
    """Mean of each distillation seed."""
    fixed: bool
    """Whether no seed changes the images."""
    row: dict[str, Any]

    @property
    def sample(self) -> Sample:
        return sample_of(self.sets, self.fixed)

    @property
    def images(self) -> frozenset[str]:
        return frozenset(self.sets)


@dataclass(frozen=True)
class _Comparison:
    """A method beside a reference."""

    row: dict[str, Any]
    prefix: str
    images: frozenset[frozenset[str]]
    """The two collections of images: comparisons that share them are one hypothesis."""
    found: Difference
    scope: Scope | str


def compare(students: "pd.DataFrame") -> "pd.DataFrame":
    """Return a row for each setting and method: means, intervals, and the differences to the references.

    Args:
        students: a row for each student, all fit to be compared: the columns of ``COMPARABLE``, or of
            ``SETTING`` where there is one recipe, ``method``, ``name``
            (tells distillations of one method apart; each is compared with the random baseline of its name, or else
            with that of name ""), ``baseline``, ``distillation_seed``, ``student_seed``, ``images`` (names the
            distilled set), ``metrics`` (fractions) and, if known, ``seeded`` (whether a seed changes the images).

    Returns:
        Accuracies and differences as fractions: ``top1``, its ``top1_half_width`` where at least three independent
        sets tell one, ``top1_least`` and ``top1_most`` of the values; the same of ``top5``. ``sets`` (distinct
        distilled sets), ``students`` (most of one set), ``n`` (all), ``fixed``, and ``values`` by set and student seed.
        ``difference`` to ``REFERENCE``; its ``scope`` (``set_samples.Scope`` or ``SAME``); ``low`` and ``high`` at the
        level of ``p_adjusted``, or at 95 % for this set only; ``low95`` and ``high95``, not adjusted; ``p``;
        ``p_adjusted`` by Holm over the distinct comparisons of the setting; ``detects``, the smallest difference found
        with 80 % power. The same with ``coreset_`` for ``CORESET``. ``behind``: points behind the highest mean of the
        setting, with ``behind_scope``, ``behind_p`` (Bonferroni over the others), ``behind_low`` and ``behind_high`` at
        the same level, and ``behind_detects``; 0 and ``best`` for the method that has it. ``same_as``: an earlier
        method of the setting that chose the same images. Missing
        where there is nothing to say.
    """
    import pandas as pd

    if "recipe_name" not in students:
        students = students.assign(recipe_name="")
    rows: list[dict[str, Any]] = []
    for setting, group in students.groupby(COMPARABLE):
        cells = _cells(dict(zip(COMPARABLE, setting, strict=True)), group)
        by_teacher = several_teachers(group)
        _behind(cells, by_teacher)
        _adjust([_comparison(cell, cells, reference, by_teacher) for reference in _REFERENCES for cell in cells])
        for index, cell in enumerate(cells):
            same = next((other for other in cells[:index] if other.images == cell.images), None)
            cell.row["same_as"] = same.method if same and same.method != cell.method else None
            rows.append(cell.row)
    metrics = [f"{metric}{part}" for metric in ("top1", "top5") for part in ("", "_half_width", "_least", "_most")]
    columns = [*COMPARABLE, "method", "name", "baseline", *metrics, "sets", "students", "n", "fixed", "values"]
    columns += ["same_as", *_BEHIND]
    return pd.DataFrame(rows, columns=[*columns, *(f"{pre}{key}" for pre in _REFERENCES.values() for key in _COMPARED)])


def _cells(setting: dict[str, Any], group: "pd.DataFrame") -> list[_Cell]:
    """Return the methods of a setting: those in question first, then the baselines, random images last."""
    cells = []
    for (method, name), own in group.groupby(["method", "name"]):
        sets, baseline = by_set(own, "top1"), bool(own["baseline"].iloc[0])
        # One collection of images from several seeds: they change nothing.
        fixed = len(sets) == 1 and own["distillation_seed"].nunique() > 1
        fixed = fixed or ("seeded" in own and not own["seeded"].any())
        row = {**setting, "method": method, "name": name, "baseline": baseline, "fixed": fixed}
        for metric in ("top1", "top5"):
            if found := by_set(own, metric):
                sample = sample_of(found, fixed)
                spread = sample.interval()
                row |= {metric: sample.mean, f"{metric}_half_width": spread.half_width if spread else math.nan}
                row |= {f"{metric}_least": min(sample.values), f"{metric}_most": max(sample.values)}
        sizes = [len(values) for values in sets.values()]
        row |= {"sets": len(sizes), "students": max(sizes), "n": sum(sizes)}
        seeds = zip(own["images"], own["student_seed"], own["metrics"], strict=True)
        row["values"] = {(images, int(seed)): metrics["top1"] for images, seed, metrics in seeds}
        tops = own["metrics"].map(lambda metrics: metrics["top1"])
        means = {int(seed): float(mean) for seed, mean in tops.groupby(own["distillation_seed"]).mean().items()}
        cells.append(_Cell(method, name, baseline, sets, means, fixed, row))
    return sorted(cells, key=lambda cell: (cell.method == REFERENCE, cell.baseline, cell.method, cell.name))


def _comparison(cell: _Cell, cells: list[_Cell], reference: str, by_teacher: bool) -> _Comparison | None:
    """Return a method beside a reference of its name, or of no name; None where there is none but itself."""
    found = {other.name: other for other in cells if other.method == reference}
    other = found.get(cell.name) or found.get("")
    if other is None and reference == CORESET:
        other = next(iter(found.values()), None)
    if other is None or cell.method == reference:
        return None
    pair = frozenset((cell.images, other.images))
    difference, scope = _difference(cell, other, by_teacher)
    return _Comparison(cell.row, _REFERENCES[reference], pair, difference, SAME if len(pair) == 1 else scope)


def _difference(cell: _Cell, other: _Cell, by_teacher: bool) -> tuple[Difference, Scope]:
    """Return how two cells differ; sets of one seed that share a teacher of their own are pairs."""
    difference, scope = compared(cell.sample, other.sample)
    shared = sorted(cell.seeds.keys() & other.seeds.keys())
    if by_teacher and len(shared) >= FEWEST:
        difference = paired(*([one.seeds[seed] for seed in shared] for one in (cell, other)))
        scope = "sets" if difference.error > 0 else "none"
    return difference, scope


def _behind(cells: Sequence[_Cell], by_teacher: bool) -> None:
    """Write into the rows how far each method is behind the highest mean.

    A method stays among the best unless another one beats it at 5 % over the number of others: the best method is then
    left out with a chance of at most 5 %, whichever it is, although the data chose whom the others are compared with
    (subset selection: S. S. Gupta, Technometrics 7 (1965), 225-245; here with Bonferroni's bound).
    """
    best = max(cells, key=lambda cell: cell.sample.mean)
    others = max(1, len({cell.images for cell in cells}) - 1)
    for cell in cells:
        if cell.images == best.images:
            cell.row.update(behind=0.0, behind_scope="best")
            continue
        found, scope = _difference(best, cell, by_teacher)
        cell.row.update(behind=found.mean, behind_scope=scope)
        if scope == "sets":
            level = 1 - 0.05 / others
            low, high = found.bounds(level)
            cell.row.update(behind_p=min(1.0, others * found.p), behind_low=low, behind_high=high)
            cell.row["behind_detects"] = found.detects(level)


def _adjust(comparisons: Iterable[_Comparison | None]) -> None:
    """Write the comparisons of a setting into their rows, adjusted for the number of distinct ones."""
    made = [one for one in comparisons if one]
    tests = {one.images: one.found.p for one in made if one.scope == "sets"}
    adjusted = adjusted_together(tests)
    for one in made:
        found: dict[str, Any] = {"difference": one.found.mean, "scope": one.scope}
        if one.scope == "sets":
            raised, level = adjusted[one.images]
            # The least difference that the test finds is asked before the data are seen: at the level of all tests.
            smallest = one.found.detects(1 - 0.05 / len(tests))
            found |= {"p": tests[one.images], "p_adjusted": raised, "detects": smallest}
            found["low"], found["high"] = one.found.bounds(level)
            found["low95"], found["high95"] = one.found.bounds()
        elif one.scope == "this set":
            found["low"], found["high"] = one.found.bounds()
        one.row.update({f"{one.prefix}{key}": value for key, value in found.items()})


def several_teachers(group: "pd.DataFrame") -> bool:
    """Return whether every distillation seed of a setting has a teacher of its own, the same for all methods."""
    if "teacher" not in group or group["teacher"].nunique() < 2:
        return False
    by_seed = group.groupby("distillation_seed")["teacher"]
    return bool((by_seed.nunique() == 1).all() and by_seed.first().is_unique)


def sample_of_values(values: Mapping[tuple[str, int], float], fixed: bool) -> Sample:
    """Return the sample of values by set and student seed, at least one."""
    sets: dict[str, list[float]] = {}
    for (images, _), value in values.items():
        sets.setdefault(images, []).append(value)
    return sample_of(sets, fixed)


def by_set(cell: "pd.DataFrame", metric: str) -> dict[str, list[float]]:
    """Return the values of each distilled set, one for each student seed.

    A selection gives the same images whatever the distillation seed, and a student seed the same student on them.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for images, seed, metrics in zip(cell["images"], cell["student_seed"], cell["metrics"], strict=True):
        if metric in metrics:
            found.setdefault(images, {}).setdefault(int(seed), []).append(metrics[metric])
    return {images: [fmean(values) for values in seeds.values()] for images, seeds in found.items()}
