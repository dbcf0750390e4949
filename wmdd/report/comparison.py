"""Methods compared with each other, setting by setting."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
from wmdd.records.intervals import Interval, Seeds, holm, interval, paired_by_seed

SETTING = ["dataset", "classes", "resolution", "ipc", "network", "regime", "view"]
"""What two methods must share to stand in one comparison."""


REFERENCE = "random"
"""The method that the others are compared with: random real images."""


CORESET = "medoids"
"""The selection of real images that they are compared with as well, where it was measured."""


def compare(students: "pd.DataFrame") -> "pd.DataFrame":
    """Return a row for each setting and method: means, intervals, and the difference to the random baseline.

    Args:
        students: a row for each student, all fit to be compared: the columns of ``SETTING``, ``method``, ``name``
            (tells distillations of one method apart; each is paired with the random baseline of its name, or else with
            that of name ""), ``baseline``, ``distillation_seed``, ``student_seed``, ``images`` (names the distilled
            set) and ``metrics`` (fractions).

    Returns:
        Accuracies and differences as fractions: ``top1``, ``top1_half_width``, the same of ``top5``; the counts
        ``sets`` (distinct distilled sets; the interval is over their means if there are two, else over students),
        ``students`` (most of one set) and ``n`` (all); ``difference``, ``low``, ``high``, ``p``, ``pairs`` and
        ``paired_distillation_seeds``; ``p_holm``, adjusted over the methods of the setting; ``coreset_difference``,
        ``coreset_low`` and ``coreset_high`` to ``CORESET``. Missing where there is nothing to say.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for setting, group in students.groupby(SETTING):
        cells = dict(list(group.groupby(["method", "name"])))
        top1 = {key: _by_seeds(cell) for key, cell in cells.items()}
        references, coresets = (
            {name: values for (method, name), values in top1.items() if method == wanted}
            for wanted in (REFERENCE, CORESET)
        )
        compared: list[dict[str, Any]] = []
        # The methods in question come first, then what they are held against.
        order = sorted(cells, key=lambda key: (key[0] == REFERENCE, bool(cells[key]["baseline"].iloc[0]), key))
        for method, name in order:
            cell = cells[method, name]
            row = dict(zip(SETTING, setting, strict=True)) | {"method": method, "name": name}
            row |= {"baseline": bool(cell["baseline"].iloc[0])}
            for metric in ("top1", "top5"):
                if sets := _by_set(cell, metric):
                    found = _over_sets(sets)
                    row |= {metric: found.mean, f"{metric}_half_width": found.half_width}
            sizes = [len(students) for students in _by_set(cell, "top1").values()]
            row |= {"sets": len(sizes), "students": max(sizes), "n": sum(sizes)}
            reference = references.get(name) or references.get("", {})
            if method != REFERENCE and (pairs := paired_by_seed(top1[method, name], reference)):
                row |= {"difference": pairs.mean, "low": pairs.low, "high": pairs.high, "p": pairs.p, "pairs": pairs.n}
                row["paired_distillation_seeds"] = pairs.distillation_seeds
                if not math.isnan(pairs.p):
                    compared.append(row)
            coreset = coresets.get(name) or coresets.get("") or next(iter(coresets.values()), {})
            if method != CORESET and (pairs := paired_by_seed(top1[method, name], coreset)):
                row |= {"coreset_difference": pairs.mean, "coreset_low": pairs.low, "coreset_high": pairs.high}
            rows.append(row)
        for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
            row["p_holm"] = p
    columns = [*SETTING, "method", "name", "baseline", "top1", "top1_half_width", "top5", "top5_half_width"]
    columns += ["sets", "students", "n", "difference", "low", "high", "p", "p_holm", "pairs"]
    columns += ["coreset_difference", "coreset_low", "coreset_high"]
    return pd.DataFrame(rows, columns=[*columns, "paired_distillation_seeds"])


def _over_sets(sets: Mapping[str, Sequence[float]]) -> Interval:
    return interval([fmean(values) for values in sets.values()] if len(sets) > 1 else next(iter(sets.values())))


def _by_set(cell: "pd.DataFrame", metric: str) -> dict[str, list[float]]:
    """Return the values of each distilled set, one for each student seed.

    A selection gives the same images whatever the distillation seed, and a student seed the same student on them.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for images, seed, metrics in zip(cell["images"], cell["student_seed"], cell["metrics"], strict=True):
        if metric in metrics:
            found.setdefault(images, {}).setdefault(int(seed), []).append(metrics[metric])
    return {images: [fmean(values) for values in seeds.values()] for images, seeds in found.items()}


def _by_seeds(cell: "pd.DataFrame") -> dict[Seeds, float]:
    seeds = zip(cell["distillation_seed"], cell["student_seed"], cell["metrics"], strict=True)
    return {(int(d), int(s)): metrics["top1"] for d, s, metrics in seeds}
