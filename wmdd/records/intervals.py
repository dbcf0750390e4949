"""Intervals and tests over independent distilled sets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

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
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, 1, math.nan)
    std = float(np.std(values, ddof=1))
    quantile = float(stdtrit(n - 1, 0.5 + level / 2))
    return Interval(mean, quantile * std / math.sqrt(n), n, std)


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Paired:
    """Return the mean of d = a − b with its interval d̄ ± t · s_d / √n and the two-sided p of t = d̄ √n / s_d.

    Both are ``scipy.stats.ttest_rel``'s. With one pair ``low``, ``high`` and ``p`` are NaN. Where all differences are
    equal, s_d is 0: the interval is the point d̄, and p is 1 for d̄ = 0 and else 0.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    import numpy as np
    from scipy.special import stdtr, stdtrit

    if len(a) != len(b) or not a:
        raise ValueError(f"paired values need the same, positive length; got {len(a)} and {len(b)}")
    differences = np.subtract(a, b)
    mean, n = float(differences.mean()), len(a)
    if n == 1:
        return Paired(mean, math.nan, math.nan, math.nan, 1)
    # Rounding leaves equal differences unequal in the last digits, where a t-value would mean nothing.
    if np.ptp(differences) <= 1e-12 * np.abs((a, b)).max():
        return Paired(mean, mean, mean, float(np.isclose(mean, 0, atol=1e-12)), n)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    width = float(stdtrit(n - 1, 0.5 + level / 2)) * error
    return Paired(mean, mean - width, mean + width, float(2 * stdtr(n - 1, -abs(mean / error))), n)


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
