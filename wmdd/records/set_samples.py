"""What a few distilled sets can say: their independent values, and how two methods differ.

The population that a table speaks of is all the sets that a method would distill from the same data with other seeds.
Students of one set tell how students vary, and nothing about that population.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from wmdd.records.intervals import Difference, Interval, interval, welch

FEWEST = 3
"""Independent values below which no interval is given: of two, it is wider than any accuracy."""

Scope = Literal["sets", "this set", "none"]
"""What an interval of a difference is about: the methods, the one set at hand, or nothing: there is none."""


@dataclass(frozen=True)
class Sample:
    """The independent values of a method in one setting."""

    values: tuple[float, ...]
    """Means of the sets; of a single set, its students."""
    kind: Literal["sets", "fixed", "one set"]
    """``fixed``: no seed changes the images, so that students are all that varies. ``one set``: of a seeded method."""

    @property
    def mean(self) -> float:
        """The mean of the sets, each counted once."""
        return fmean(self.values)

    @property
    def speaks(self) -> bool:
        """Whether the values tell how the method varies: at least ``FEWEST``, and not of one set of a seeded method."""
        return self.kind != "one set" and len(self.values) >= FEWEST

    def interval(self) -> Interval | None:
        """Return the interval of the method's mean; None where the values do not tell it, or do not vary at all."""
        found = interval(self.values) if self.speaks else None
        return found if found and found.std > 1e-12 else None


def sample_of(sets: Mapping[str, Sequence[float]], fixed: bool = False) -> Sample:
    """Return the sample of a method.

    Args:
        sets: values of the students of each distilled set.
        fixed: whether no seed changes the images.

    Raises:
        ValueError: there are no sets.
    """
    if not sets:
        raise ValueError("a sample needs at least one distilled set")
    if len(sets) > 1:
        return Sample(tuple(fmean(values) for values in sets.values()), "sets")
    return Sample(tuple(next(iter(sets.values()))), "fixed" if fixed else "one set")


def compared(one: Sample, other: Sample) -> tuple[Difference, Scope]:
    """Return how two methods differ, and what the interval of the difference is about.

    Two methods that both speak are compared by ``welch``: sets of one seed share no images, and pairing them would
    cost degrees of freedom for nothing. A single set beside a method that speaks has an interval of its own, over its
    students and the other's sets: it is about this set, and has no p-value. Everything else is a difference alone.
    """
    plain = Difference(one.mean - other.mean)
    if not other.speaks or len(one.values) < FEWEST or (one.kind == "sets" and not one.speaks):
        return plain, "none"
    found = welch(one.values, other.values)
    if not found.error > 0:
        return plain, "none"
    return found, "sets" if one.speaks else "this set"
