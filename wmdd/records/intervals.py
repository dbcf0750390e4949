"""Intervals and tests over independent values."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

LEVEL = 0.95
"""Confidence level of every interval that is not adjusted for several comparisons."""
POWER = 0.8
"""Power at which the smallest detectable difference is given."""


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
class Difference:
    """An estimated difference, with what its t-interval at any level needs."""

    mean: float
    error: float = math.nan
    """Standard error of ``mean``; NaN where the values cannot tell it, and then nothing below is known."""
    freedom: float = math.nan
    """Degrees of freedom of ``error``."""

    def bounds(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval ``mean ± t · error``; NaN twice where the error is not known."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.freedom, 0.5 + level / 2)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """The two-sided p-value of no difference; NaN where the error is not known."""
        from scipy.special import stdtr

        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error)) if self.error > 0 else math.nan

    def detects(self, level: float = LEVEL, power: float = POWER) -> float:
        """Return the smallest true difference that a test at this level finds with this power: (t + t') · error."""
        from scipy.special import stdtrit

        quantiles = stdtrit(self.freedom, 0.5 + level / 2) + stdtrit(self.freedom, power)
        return float(quantiles) * self.error


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean x̄ of ``n`` values with Student's interval x̄ ± t(1 − (1 − level)/2; n − 1) · s / √n.

    ``s² = Σ (x − x̄)² / (n − 1)``. With one value, ``half_width`` and ``std`` are NaN.

    Raises:
        ValueError: there are no values.
    """
    import numpy as np
    from scipy.special import stdtrit

    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, 1, math.nan)
    std = float(np.std(values, ddof=1))
    return Interval(mean, float(stdtrit(n - 1, 0.5 + level / 2)) * std / math.sqrt(n), n, std)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return the mean of d = a − b with its error s_d / √n: for values that share something, such as their images.

    The interval and p are ``scipy.stats.ttest_rel``'s. The error is NaN for one pair, and where all differences are
    equal: n values cannot show how they vary.

    Raises:
        ValueError: the lengths differ, or there are no pairs.
    """
    import numpy as np

    if len(a) != len(b) or not a:
        raise ValueError(f"paired values need the same, positive length; got {len(a)} and {len(b)}")
    differences = np.subtract(a, b)
    return _difference(float(differences.mean()), [_share(differences.tolist())], np.abs((a, b)).max())


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return mean(a) − mean(b) of independent values: error² = s_a²/n_a + s_b²/n_b, freedom by Welch–Satterthwaite.

    B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved",
    Biometrika 34 (1947), 28–35; the interval and p are ``scipy.stats.ttest_ind``'s with ``equal_var=False``. The error
    is NaN where a side has one value, and where no value differs from the others of its side.

    Raises:
        ValueError: a side has no values.
    """
    import numpy as np

    if not len(a) or not len(b):
        raise ValueError(f"a comparison needs values on both sides; got {len(a)} and {len(b)}")
    mean = float(np.mean(a) - np.mean(b))
    return _difference(mean, [_share(a), _share(b)], max(np.abs(a).max(), np.abs(b).max()))


def combined(mean: float, parts: Sequence[Sequence[float]]) -> Difference:
    """Return ``mean`` with the error of a sum of the means of independent samples (``welch``)."""
    return _difference(mean, [_share(part) for part in parts], 1.0)


def _share(values: Sequence[float]) -> tuple[float, int]:
    """Return s² / n and the degrees of freedom."""
    import numpy as np

    n = len(values)
    return (float(np.var(values, ddof=1)) / n, n - 1) if n > 1 else (math.nan, 0)


def _difference(mean: float, shares: Sequence[tuple[float, int]], scale: float) -> Difference:
    square = sum(share for share, _ in shares)
    # Rounding leaves equal values unequal in the last digits, where a t-value would mean nothing.
    if math.isnan(square) or math.sqrt(square) <= 1e-12 * scale:
        return Difference(mean)
    return Difference(mean, math.sqrt(square), square**2 / sum(share**2 / freedom for share, freedom in shares))


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


def adjusted_level(p: float, adjusted: float, comparisons: int, level: float = LEVEL) -> float:
    """Return the level of an interval that excludes zero exactly where the adjusted p-value is at most 1 − level.

    Args:
        p: p-value of one of the comparisons.
        adjusted: the same after ``holm``.
        comparisons: number of comparisons that were adjusted together.
        level: of the family.
    """
    factor = adjusted / p if p > 0 else comparisons
    return 1 - (1 - level) / max(1.0, factor)


def adjusted_together(pvalues: Mapping[K, float]) -> dict[K, tuple[float, float]]:
    """Return, for each comparison of a family, its p-value after ``holm`` and the level of its adjusted interval."""
    raised = holm(list(pvalues.values()))
    return {
        key: (one, adjusted_level(p, one, len(pvalues))) for (key, p), one in zip(pvalues.items(), raised, strict=True)
    }
