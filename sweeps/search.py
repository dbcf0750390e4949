"""The values of the next trial: a function of the seed, the trial's number and the reports of the other trials.

No state is kept between two calls, so a killed sweep resumes as if it had not been killed.
"""

import random
import warnings
from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeps.format import Values
from sweeps.objective import SweepObjective
from sweeps.space import Space
from sweeps.trial_log import Trial
from wmdd.runtime.seeding import seed_of

Kind = Literal["optuna", "random", "grid"]

optuna.logging.set_verbosity(optuna.logging.WARNING)

_RANDOM_TRIALS_FIRST = 5
"""Random trials that the tree-structured Parzen estimator needs before it can learn."""


def suggest(
    space: Space, kind: Kind, seed: int, objective: SweepObjective, number: int, trials: Sequence[Trial]
) -> Values | None:
    """Return the values of one trial; None after the end of the grid.

    Args:
        space: keys to vary and their values.
        kind: ``optuna`` (TPE, Bergstra et al. 2011, with all keys in one model), ``random``, or ``grid``. The grid has
            all combinations in a random order, so that a part of it covers the whole space.
        seed: random seed of the sweep.
        objective: objective of the sweep.
        number: number of the trial, from 1. Trial 0 is the unchanged config.
        trials: all trials of the sweep so far, finished or not.
    """
    if kind == "grid":
        combinations = space.grid()
        random.Random(seed).shuffle(combinations)
        return combinations[number - 1] if number <= len(combinations) else None
    draw = seed_of(seed, "trial", number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=draw)
            if kind == "random"
            else optuna.samplers.TPESampler(
                seed=draw, n_startup_trials=_RANDOM_TRIALS_FIRST, multivariate=True, group=True, constant_liar=True
            )
        )
        study = study_of(space, objective, trials, sampler)
        return space.suggest(study.ask())


def study_of(
    space: Space,
    objective: SweepObjective,
    trials: Sequence[Trial],
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """Return the trials as an Optuna study, without those whose values are outside the space."""
    study = optuna.create_study(direction=objective.direction, sampler=sampler)
    for trial in trials:
        value = objective.value(trial, trials) if trial.state == "done" else None
        steps = {report["rung"]: report[objective.key] for report in trial.reports if objective.key in report}
        known = _as_optuna(space, trial, _STATES[trial.state], value, {} if trial.state == "running" else steps)
        if known is not None:
            study.add_trial(known)
    return study


def importances(space: Space, objective: SweepObjective, trials: Sequence[Trial]) -> tuple[int, int, dict[str, float]]:
    """Return how much of the objective's variance each key explains by itself (fANOVA, Hutter et al. 2014).

    Stopped trials count too; complete trials alone would be a biased choice. All are compared at the latest report that
    every trial reached. Keys with a condition (``when``) are left out.

    Returns:
        Number of that report, number of trials, and share of each key. There are no shares below
        ``_MIN_TRIALS_FOR_IMPORTANCE`` trials.
    """
    reached = [trial for trial in trials if trial.state in ("done", "stopped")]
    rung = min((len(trial.reports) for trial in reached), default=0)
    study = optuna.create_study(direction=objective.direction)
    for trial in reached:
        known = _as_optuna(space, trial, TrialState.COMPLETE, trial.reports[rung - 1][objective.key], {})
        if known is not None:
            study.add_trial(known)
    count = len(study.trials)
    if count < _MIN_TRIALS_FOR_IMPORTANCE:
        return rung, count, {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):  # all trials have the same value
        return rung, count, {}
    return rung, count, {key: float(share) for key, share in found.items()}


_MIN_TRIALS_FOR_IMPORTANCE = 4
"""Least number of trials for an estimate of importance."""

_STATES = {
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def _as_optuna(
    space: Space, trial: Trial, state: TrialState, value: float | None, steps: dict[int, float]
) -> FrozenTrial | None:
    """Return a trial in Optuna's format; None if its values are outside the space."""
    active = [parameter for parameter in space.parameters if parameter.active(trial.values)]
    try:
        params = {parameter.key: parameter.domain.encode(trial.values[parameter.key]) for parameter in active}
    except (KeyError, ValueError):
        return None
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params=params,
        distributions={parameter.key: parameter.domain.distribution() for parameter in active},
        intermediate_values=steps,
    )
