"""The objectives of sweeps. All are measured on the hold-out, none on the test set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sweeps.trial_log import Trial
from wmdd.errors import InputError, nearest

TOLERANCE = 0.01
"""Top-1 (fraction) that a faster recipe may lose against the unchanged config."""


@dataclass(frozen=True)
class SweepObjective:
    """One way to judge a trial."""

    name: str
    key: str
    """Key of the value in a trial's report"""
    direction: Literal["maximize", "minimize"]
    students: bool
    """Whether intermediate images need a probe student"""
    meaning: str

    @property
    def mode(self) -> str:
        """``max`` or ``min``, in Ray's words."""
        return self.direction[:3]

    @property
    def sign(self) -> int:
        """1 if more is better, else −1."""
        return 1 if self.direction == "maximize" else -1

    def value(self, trial: Trial, trials: Sequence[Trial]) -> float:
        """Return the value of a finished trial.

        For ``time`` the value is infinity if top-1 is more than ``TOLERANCE`` below that of trial 0, the unchanged
        config: a recipe must not be fast because its images are bad.
        """
        value = float(trial.last[self.key])
        reference = trials[0].last if trials and trials[0].state == "done" else {}
        if self.name == "time" and trial.last["top1"] < reference.get("top1", 0.0) - TOLERANCE:
            return math.inf
        return value

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """Return the best complete trial, the earliest of equals; None if no trial is complete."""
        done = [trial for trial in trials if trial.state == "done" and not math.isnan(self.value(trial, trials))]
        return min(done, key=lambda trial: -self.sign * self.value(trial, trials), default=None)

    def text(self, value: float) -> str:
        """Return a value as text with its unit."""
        if math.isinf(value):
            return "loses accuracy"
        return f"{100 * value:.2f} %" if self.key == "top1" else f"{value:.3g}{' s' if self.name == 'time' else ''}"


_ALL = (
    SweepObjective(
        "top1", "top1", "maximize", True, "top-1 on the hold-out, mean of networks, label regimes and seeds"
    ),
    SweepObjective("lrs", "lrs", "maximize", True, "label-robust score (DD-Ranking) on the hold-out"),
    SweepObjective(
        "w2", "w2", "minimize", False, "squared W2 from the images' features to the hold-out's, mean of classes"
    ),
    SweepObjective("time", "synthesis_seconds", "minimize", False, "seconds of synthesis, top-1 at most a point lower"),
)
OBJECTIVES = {objective.name: objective for objective in _ALL}


def objective_of(name: str) -> SweepObjective:
    """Return an objective by its name.

    Raises:
        InputError: the objective does not exist. For a name with ``test``, the message explains why.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if "test" in name:
        raise InputError(
            f"--objective {name}: a recipe chosen on the test set proves nothing; use one of"
            f" {', '.join(OBJECTIVES)}, measured on images held out of the training set"
        )
    raise InputError(f"--objective {name}: no such objective; {nearest(name, list(OBJECTIVES))}")


def seeds_of(trial: Trial) -> list[float]:
    """Return top-1 of a complete trial for each student seed. All students share one distilled set."""
    seeds: list[float] = trial.last.get("seeds") or []
    return seeds if trial.state == "done" else []


def range_text(values: Sequence[float]) -> str:
    """Return the range of several accuracies, in percent. It is no interval: the students share one set."""
    return f"{100 * min(values):.2f}–{100 * max(values):.2f}" if len(values) > 1 else ""
