"""Whether students were trained until more training changes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

TWICE = "-twice"
"""Ending of the views whose students train twice as long."""
POINTS = 0.01
"""Difference of the mean that counts as none, a fraction."""
STUDENTS = 3
"""Students that must have trained twice as long before anything is said."""

State = Literal["converged", "improving", "not checked"]
Values = Mapping[tuple[str, int], float]
"""Top-1 by distilled set and student seed."""


@dataclass(frozen=True)
class Convergence:
    """What training twice as long changed."""

    state: State
    change: float | None = None
    """Mean over the students that trained both ways, a fraction."""

    @property
    def text(self) -> str:
        """The state with its change in points."""
        return self.state if self.change is None else f"{self.state} ({100 * self.change:+.1f})".replace("-", "−")


def convergence(once: Values, twice: Values) -> Convergence:
    """Compare students with those of the same sets and seeds that trained twice as long.

    ``converged``: the mean of at least three moves by less than one point. ``improving``: it moves by more, in either
    direction: the number of updates then decides the result.
    """
    shared = sorted(once.keys() & twice.keys())
    if len(shared) < STUDENTS:
        return Convergence("not checked")
    change = fmean(twice[key] - once[key] for key in shared)
    return Convergence("converged" if abs(change) < POINTS else "improving", change)


def base_view(view: str) -> str:
    """Return the view whose students train half as long, or the view itself."""
    return view.removesuffix(TWICE)


def with_twice(views: Sequence[str]) -> tuple[str, ...]:
    """Return the views, and beside each that can be doubled the one that trains twice as long."""
    return (*views, *(f"{view}{TWICE}" for view in views if view in ("epochs", "updates")))
