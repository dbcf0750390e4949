"""What trials are judged by.  Every objective is measured on the hold-out; none knows the test set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sweeps.trial_log import Trial
from wmdd.errors import InputError, nearest

TOLERANCE = 0.01
"""Top-1 (fraction) that a faster recipe may lose against the config as it stands."""


@dataclass(frozen=True)
class SweepObjective:
    """One way to judge a trial."""

    name: str
    key: str
    """Of a report"""
    direction: Literal["maximize", "minimize"]
    students: bool
    """Whether intermediate images need a probe student"""
    meaning: str

    @property
    def mode(self) -> str:
        """``max`` or ``min``, as Ray says it."""
        return self.direction[:3]

    def value(self, trial: Trial, trials: Sequence[Trial]) -> float:
        """Return the worth of a finished trial among the others.

        A recipe that is fast because its images are bad has no worth: for ``time`` it is infinity where top-1 falls
        more than ``TOLERANCE`` below that of trial 0, the config as it stands.
        """
        value = float(trial.last[self.key])
        reference = trials[0].last if trials and trials[0].state == "done" else {}
        if self.name == "time" and trial.last["top1"] < reference.get("top1", 0.0) - TOLERANCE:
            return math.inf
        return value

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """Return the best trial that ran to its end, the earliest of equals; None if there is none."""
        done = [trial for trial in trials if trial.state == "done" and not math.isnan(self.value(trial, trials))]
        sign = 1 if self.direction == "minimize" else -1
        return min(done, key=lambda trial: sign * self.value(trial, trials), default=None)

    def text(self, value: float) -> str:
        """Return a value as people read it."""
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
        InputError: no such objective; an objective on the test set is refused by name.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if "test" in name:
        raise InputError(
            f"--objective {name}: the test set is no objective, a recipe chosen on it proves nothing; use one of"
            f" {', '.join(OBJECTIVES)}, measured on images held out of the training set"
        )
    raise InputError(f"--objective {name}: no such objective; {nearest(name, list(OBJECTIVES))}")


def seeds_of(trial: Trial) -> list[float]:
    """Return top-1 of a finished trial for each student seed; they are students of one distilled set."""
    seeds: list[float] = trial.last.get("seeds") or []
    return seeds if trial.state == "done" else []


def range_text(values: Sequence[float]) -> str:
    """Return the least and the most of several accuracies, in percent: one set has no interval."""
    return f"{100 * min(values):.2f}–{100 * max(values):.2f}" if len(values) > 1 else ""
