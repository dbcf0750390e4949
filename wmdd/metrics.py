"""What accuracies of several seeds say together: intervals, paired differences, correction for many comparisons.

Two seeds are nested in every accuracy: the distillation's, which decides the images, and the student's. Students of one
distilled set share its luck: they are no independent evidence about the method (pseudo-replication). So the unit of an
interval is the distilled set, wherever there are two of them; over a single set an interval tells how students vary,
and nothing about another distillation. Both counts belong beside a mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SETTING = ["dataset", "classes", "resolution", "ipc", "network", "regime", "view"]
"""What two methods must share to stand in one comparison."""
REFERENCE = "random"
"""The method that the others are compared with: random real images."""
CORESET = "medoids"
"""The selection of real images that they are compared with as well, where it was measured."""

Seeds = tuple[int, int]
"""(distillation seed, student seed)."""


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its confidence interval, in the unit of the values."""

    mean: float
    half_width: float
    """NaN for a single value."""
    n: int
    std: float
    """Standard deviation of the sample (n − 1); NaN for a single value."""


@dataclass(frozen=True)
class Paired:
    """The mean difference a − b of paired values, its confidence interval and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    """Pairs."""
    distillation_seeds: int | None = None
    """Distinct distillation seeds among the pairs; None where the values carried no seeds."""


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean x̄ of ``n`` values with Student's interval x̄ ± t(1 − (1 − level)/2; n − 1) · s / √n.

    ``s² = Σ (x − x̄)² / (n − 1)``. With one value, ``half_width`` and ``std`` are NaN.

    Raises:
        ValueError: there are no values.
    """
    import numpy as np
    from scipy import stats

    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, 1, math.nan)
    std = float(np.std(values, ddof=1))
    quantile = float(stats.t.ppf(0.5 + level / 2, n - 1))
    return Interval(mean, quantile * std / math.sqrt(n), n, std)


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Paired:
    """Return the mean of d = a − b with its interval d̄ ± t · s_d / √n and the two-sided p of t = d̄ √n / s_d.

    Both are ``scipy.stats.ttest_rel``'s. With one pair ``low``, ``high`` and ``p`` are NaN. Where all differences are
    equal, s_d is 0: the interval is the point d̄, and p is 1 for d̄ = 0 and else 0.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    import numpy as np
    from scipy import stats

    if len(a) != len(b) or not a:
        raise ValueError(f"paired values need the same, positive length; got {len(a)} and {len(b)}")
    differences = np.subtract(a, b)
    mean, n = float(differences.mean()), len(a)
    if n == 1:
        return Paired(mean, math.nan, math.nan, math.nan, 1)
    # Rounding leaves equal differences unequal in the last digits, where a t-value would mean nothing.
    if np.ptp(differences) <= 1e-12 * np.abs((a, b)).max():
        return Paired(mean, mean, mean, float(np.isclose(mean, 0, atol=1e-12)), n)
    test = stats.ttest_rel(a, b)
    bounds = test.confidence_interval(level)
    return Paired(mean, float(bounds.low), float(bounds.high), float(test.pvalue), n)


def paired_by_seed(a: Mapping[Seeds, float], b: Mapping[Seeds, float], level: float = 0.95) -> Paired | None:
    """Pair values whose distillation seed and student seed both agree; None where no pair is found.

    Over two or more distillation seeds the differences are first averaged within each, and the interval has one degree
    of freedom less than there are seeds; over a single one it counts students.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    seeds = sorted({distillation for distillation, _ in shared})
    groups = [[key for key in shared if key[0] == seed] for seed in seeds] if len(seeds) > 1 else [[k] for k in shared]
    means = [[fmean(values[key] for key in group) for group in groups] for values in (a, b)]
    result = paired(means[0], means[1], level)
    return replace(result, n=len(shared), distillation_seeds=len(seeds))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return the p-values of ``m`` comparisons adjusted by Holm's step-down method, in the order given.

    With the p-values sorted upwards, the adjusted i-th is the maximum over j ≤ i of min(1, (m − j + 1) p_j). Rejecting
    those of at most α keeps the chance of any false rejection at α. S. Holm, "A simple sequentially rejective multiple
    test procedure", Scandinavian Journal of Statistics 6 (1979), 65–70.
    """
    import numpy as np

    values = np.asarray(pvalues, dtype=float)
    order = np.argsort(values)
    steps = np.minimum(1, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(steps)
    return [float(value) for value in adjusted]


def label_robust_score(hard: float, soft: float, real_hard: float, random_soft: float, weight: float = 0.5) -> float:
    """Return how far images are worth something by themselves, whatever the labels: LRS, from 0 to 1.

    LRS = (e^α − e^−1) / (e − e^−1) with α = w·IOR − (1 − w)·HLR: ``improvement_over_random`` under the labels in
    question, ``hard_label_recovery`` under hard ones. Z. Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset
    Distillation", arXiv:2505.13300. Their formulas take fractions, as this does; their released code exponentiates
    percentages, so that its figures do not compare.

    Args:
        hard: accuracy of the images under hard labels, a fraction like all others.
        soft: accuracy of the images under the labels in question.
        real_hard: accuracy of the whole training set under hard labels.
        random_soft: accuracy of as many random real images under the labels in question.
        weight: w, the share of IOR.

    Raises:
        ValueError: an accuracy is not a fraction.
    """
    _refuse_percentages(hard, soft, real_hard, random_soft)
    gain, loss = improvement_over_random(soft, random_soft), hard_label_recovery(real_hard, hard)
    return _normalised(weight * gain - (1 - weight) * loss)


def augmentation_robust_score(
    augmented: float, random_augmented: float, plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """Return how far the gain over random real images survives without augmentation: ARS, from 0 to 1.

    ARS = (e^β − e^−1) / (e − e^−1) with β = γ·(augmented − random_augmented) + (1 − γ)·(plain − random_plain); γ is
    ``weight``. DD-Ranking, as for ``label_robust_score``.

    Raises:
        ValueError: an accuracy is not a fraction.
    """
    _refuse_percentages(augmented, random_augmented, plain, random_plain)
    gains = improvement_over_random(augmented, random_augmented), improvement_over_random(plain, random_plain)
    return _normalised(weight * gains[0] + (1 - weight) * gains[1])


def hard_label_recovery(real_hard: float, hard: float) -> float:
    """Return HLR = acc(real, hard) − acc(images, hard): what is lost against the whole training set; less is better."""
    return real_hard - hard


def improvement_over_random(images: float, random: float) -> float:
    """Return IOR = acc(images, any) − acc(random, any): what is gained over random real images; more is better."""
    return images - random


def _normalised(score: float) -> float:
    return (math.exp(score) - math.exp(-1)) / (math.e - math.exp(-1))


def _refuse_percentages(*accuracies: float) -> None:
    if not all(0 <= accuracy <= 1 for accuracy in accuracies):
        raise ValueError(f"scores are defined on accuracies from 0 to 1, got {accuracies}")


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
