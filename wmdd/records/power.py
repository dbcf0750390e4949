"""How large a difference a comparison can find, how many sets it needs, and when two methods are equivalent."""

import math
from dataclasses import dataclass

from wmdd.records.intervals import LEVEL, POWER, Difference

MOST_SETS = 10_000
"""Largest number of sets of each method that a study plans."""


def sets_needed(one: float, other: float, difference: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """Return the number of sets of each method that find a difference: the least n with (t + t') · √(s₁²+s₂²)/√n ≤ δ.

    Args:
        one: standard deviation over the sets of one method.
        other: the same of the other method; both in the unit of ``difference``.
        difference: true difference δ that is to be found, positive.
        level: of the test.
        power: chance of finding it.

    Returns:
        At least 2; None for more than ``MOST_SETS``.

    Raises:
        ValueError: the difference is not positive.
    """
    if difference <= 0:
        raise ValueError(f"a difference to be found is positive, got {difference}")
    square, fourth = one**2 + other**2, one**4 + other**4

    def enough(n: int) -> bool:
        if square == 0:
            return True
        found = Difference(0.0, math.sqrt(square / n), (n - 1) * square**2 / fourth)
        return found.detects(level, power) <= difference

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > 2 * MOST_SETS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= MOST_SETS else None


@dataclass(frozen=True)
class Equivalence:
    """The verdict of two one-sided tests."""

    low: float
    high: float
    """Interval at 1 − 2α: equivalence is claimed where it lies within ± margin."""
    p: float
    """The larger of the two one-sided p-values; NaN where the error is not known."""
    margin: float

    @property
    def holds(self) -> bool:
        """Whether the difference is smaller than the margin, at α = 5 %."""
        return self.p <= 1 - LEVEL


def equivalence(found: Difference, margin: float) -> Equivalence:
    """Test whether a difference is smaller than a margin, by two one-sided tests (TOST) at α = 5 % each.

    D. J. Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987), 657–680. That a difference is not
    significant says nothing of the kind: it may be that too few sets were measured.

    Raises:
        ValueError: the margin is not positive.
    """
    from scipy.special import stdtr

    if margin <= 0:
        raise ValueError(f"the margin of an equivalence is positive, got {margin}")
    low, high = found.bounds(2 * LEVEL - 1)
    if math.isnan(found.error):
        return Equivalence(low, high, math.nan, margin)
    sides = (found.mean - margin) / found.error, -(found.mean + margin) / found.error
    return Equivalence(low, high, float(max(stdtr(found.freedom, side) for side in sides)), margin)
