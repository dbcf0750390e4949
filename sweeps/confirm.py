"""Confirmation: the best trials and trial 0 again, with fresh seeds of the distillation and of the students.

The best of many trials looks better than it is, because the search picks lucky seeds. The confirmation repeats the best
recipes on distilled sets that had no part in the choice. The sets of one seed are pairs: each recipe is compared with
trial 0 by a paired t-test over the seeds, adjusted by Holm's method for the number of recipes.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps import trial
from sweeps.fit import Job, check_resources, fit
from sweeps.objective import SweepObjective
from sweeps.ray_cluster import TrialResources
from sweeps.run import Sweep
from sweeps.space_file import parse_budget
from sweeps.trial_log import Log, Trial
from wmdd.errors import InputError
from wmdd.records.intervals import LEVEL, Difference, Interval, adjusted_together, interval, paired
from wmdd.records.set_samples import FEWEST
from wmdd.runtime.signals import stop_on

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Comparison:
    """One recipe, compared with trial 0 on the same fresh seeds."""

    number: int
    """Number of the trial in the sweep"""
    value: Interval
    """Objective: mean and 95 % interval over the distilled sets"""
    difference: Difference
    """Objective minus that of trial 0; the sign is turned so that more is better"""
    adjusted: float
    """p-value, adjusted for all recipes; 1 where the values have none"""
    low: float
    """Lower bound of the interval of the difference that excludes 0 exactly if ``adjusted`` is at most 0.05"""
    high: float

    @property
    def better(self) -> bool:
        """Whether the recipe is better than trial 0, statistically."""
        return self.adjusted <= 1 - LEVEL and self.difference.mean > 0


@dataclass(frozen=True)
class Confirmation:
    """What a confirmation has found so far."""

    done: int
    """Number of finished repeats"""
    total: int
    """Number of repeats"""
    preset: Interval | None
    """Objective of trial 0; None below three sets"""
    comparisons: tuple[Comparison, ...]
    """Recipes in the order of their difference, the best first"""

    @property
    def complete(self) -> bool:
        """Whether every repeat is finished."""
        return self.done == self.total

    @property
    def winner(self) -> int:
        """Number of the trial that is confirmed as the best; 0 if no recipe is better than the unchanged config."""
        return next((one.number for one in self.comparisons if one.better), 0)


def confirm(
    folder: Path,
    top: int,
    seeds: int,
    budget: Mapping[str, Any],
    resources: TrialResources,
    address: str | None = None,
    table: "Callable[[Log], RenderableType] | None" = None,
) -> Confirmation:
    """Repeat the best trials and trial 0 with fresh seeds. A stopped confirmation resumes; more seeds extend it.

    Args:
        folder: folder of the sweep.
        top: number of the best trials to repeat, besides trial 0.
        seeds: number of fresh distilled sets of each.
        budget: values that replace those of the sweep's budget.
        resources: CPUs and GPUs of each repeat.
        address: address of a running Ray cluster; None starts Ray on this machine.
        table: returns the table that a terminal shows while repeats run.

    Raises:
        InputError: the folder contains no sweep, there is nothing to compare, or the budget differs from before.
        Interrupted: a signal requested a stop. The same command resumes the confirmation.
    """
    log = Log.load(folder)
    sweep = Sweep.from_identity(log.identity)
    if sweep.objective.name == "time":
        raise InputError("a sweep with the objective time has no confirmation: seconds hardly depend on seeds")
    if seeds < FEWEST or top < 1:
        raise InputError(f"--top {top} --seeds {seeds}: use at least 1 trial and {FEWEST} seeds")
    check_resources(resources, address)
    own = parse_budget("--budget", {**sweep.space.budget.model_dump(), **budget, "rungs": 1})
    setup = trial.SweepSetup(sweep.config, own, sweep.objective)
    chosen = candidates(setup, log.trials, top)
    if not chosen:
        raise InputError(f"{folder}: no complete trial differs from trial 0; resume or extend the sweep first")
    kept = Log(folder / "confirm")
    remedy = f"use the same budget, or delete {kept.path}"
    with (
        kept.held({**sweep.identity(), "budget": own.model_dump(mode="json")}, remedy),
        stop_on(signal.SIGTERM, signal.SIGINT) as stop,
    ):
        known = {(one.of, one.repeat) for one in kept.trials}
        for repeat in range(1, seeds + 1):
            for one in (log.trials[0], *chosen):
                if (one.number, repeat) not in known:
                    kept.write(Trial(len(kept.trials), one.values, of=one.number, repeat=repeat))
        todo = [one.number for one in kept.trials if not one.finished]
        job = Job(setup, kept, todo, lambda number: None, "none", len(kept.trials), table)
        fit(job, resources, address, stop)
    return confirmation(sweep.objective, kept.trials)


def candidates(setup: trial.SweepSetup, trials: Sequence[Trial], top: int) -> list[Trial]:
    """Return the best complete trials whose recipe differs from trial 0 and from each other."""
    if not trials or trials[0].state != "done":
        raise InputError("trial 0 is not complete, so there is nothing to compare with; resume the sweep")
    done = [one for one in trials if one.state == "done"]
    found = {setup.proxy(trials[0].values).fingerprint("students"): trials[0]}
    for one in sorted(done, key=lambda one: -setup.objective.sign * setup.objective.value(one, trials)):
        found.setdefault(setup.proxy(one.values).fingerprint("students"), one)
    return list(found.values())[1 : top + 1]


def load_confirmation(folder: Path, objective: SweepObjective) -> Confirmation | None:
    """Return the confirmation of a sweep; None if it was never confirmed."""
    path = folder / "confirm"
    return confirmation(objective, Log.load(path).trials) if (path / "sweep.json").exists() else None


def confirmation(objective: SweepObjective, repeats: Sequence[Trial]) -> Confirmation:
    """Compare the repeats of each recipe with those of trial 0 of the same seeds."""
    values: dict[int, dict[int, float]] = {}
    for one in repeats:
        if one.of is not None and one.state == "done":
            values.setdefault(one.of, {})[one.repeat] = float(one.last[objective.key])
    sign, preset = objective.sign, values.get(0, {})
    differences: dict[int, Difference] = {}
    for number, own in values.items():
        shared = sorted(own.keys() & preset.keys())
        if number and len(shared) >= FEWEST:
            differences[number] = paired(
                [sign * own[seed] for seed in shared], [sign * preset[seed] for seed in shared]
            )
    adjusted = adjusted_together({number: one.p for number, one in differences.items() if one.error > 0})
    found = []
    for number, difference in differences.items():
        p, low, high = 1.0, difference.mean, difference.mean
        if number in adjusted:
            p, level = adjusted[number]
            low, high = difference.bounds(level)
        value = interval(list(values[number].values()))
        found.append(Comparison(number, value, difference, p, low, high))
    found.sort(key=lambda one: -one.difference.mean)
    return Confirmation(
        sum(one.finished for one in repeats),
        len(repeats),
        interval(list(preset.values())) if len(preset) >= FEWEST else None,
        tuple(found),
    )


def lines(objective: SweepObjective, found: Confirmation) -> list[str]:
    """Return the confirmation in sentences, the verdict first."""
    if not found.complete:
        verdict = f"Confirmation: {found.done} of {found.total} repeats are finished; resume `wmdd sweep confirm`."
    elif found.winner:
        verdict = f"Confirmed: trial {found.winner} is better than trial 0, the unchanged config."
    else:
        verdict = "Nothing beats the unchanged config: no recipe is better than trial 0 on fresh seeds."
    return [verdict, *(_sentence(objective, one) for one in found.comparisons)]


def _sentence(objective: SweepObjective, one: Comparison) -> str:
    scale, unit = (100, " points") if objective.key == "top1" else (1, "")
    gain, bounds = scale * one.difference.mean, f"{scale * one.low:+.3g} to {scale * one.high:+.3g}"
    found = f"{objective.text(one.value.mean)}, gain over trial 0 {gain:+.3g}{unit} [{bounds}]"
    return f"Trial {one.number}: {found}, p {one.adjusted:.2g} after Holm, n = {one.value.n} distilled sets."


def table_rows(objective: SweepObjective, found: Confirmation) -> list[list[str]]:
    """Return the rows of the confirmation: trial, n, mean ± half-width, gain over trial 0, its interval, adjusted p."""
    scale = 100 if objective.key == "top1" else 1

    def spread(value: Interval) -> str:
        return f"{scale * value.mean:.4g} ± {scale * value.half_width:.2g}"

    rows = [["0", str(found.preset.n), spread(found.preset), "–", "–", "–"]] if found.preset else []
    for one in found.comparisons:
        bounds = f"{scale * one.low:+.3g} to {scale * one.high:+.3g}"
        gain = f"{scale * one.difference.mean:+.3g}"
        rows.append([str(one.number), str(one.value.n), spread(one.value), gain, bounds, f"{one.adjusted:.2g}"])
    return rows


COLUMNS = ["trial", "n", "mean ± 95 %", "gain", "interval of the gain", "adjusted p"]
"""Column names of ``table_rows``"""
