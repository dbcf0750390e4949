"""Which values come next: a function of the seed, the trial's number and what is known of the trials before it.

Nothing is remembered between two calls, so a sweep that was killed goes on as if it had not been.
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
"""Random trials before the tree-structured Parzen estimator has enough to learn from."""


def suggest(
    space: Space, kind: Kind, seed: int, objective: SweepObjective, number: int, trials: Sequence[Trial]
) -> Values | None:
    """Return the values of trial ``number`` (from 1; trial 0 is the config as it stands), or None at the grid's end.

    Args:
        space: what is varied.
        kind: ``optuna`` (TPE, Bergstra et al. 2011, with all keys in one model), ``random``, or ``grid``: all
            combinations in a random order that the seed decides, so that a part of a grid is spread over it.
        seed: of the sweep.
        objective: what the trials are judged by.
        number: of the trial.
        trials: all that is known, finished or not.
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
    """Return the trials as an Optuna study; those whose values the space does not contain are left out."""
    study = optuna.create_study(direction=objective.direction, sampler=sampler)
    for trial in trials:
        value = objective.value(trial, trials) if trial.state == "done" else None
        steps = {report["rung"]: report[objective.key] for report in trial.reports if objective.key in report}
        told = _as_optuna(space, trial, _STATES[trial.state], value, {} if trial.state == "running" else steps)
        if told is not None:
            study.add_trial(told)
    return study


def importances(space: Space, objective: SweepObjective, trials: Sequence[Trial]) -> tuple[int, int, dict[str, float]]:
    """Return how much of the objective's variance each key explains by itself (fANOVA, Hutter et al. 2014).

    Stopped trials count too, else only the lucky would: all are compared at the latest report that every one reached.
    Keys that only matter under conditions are left out.

    Returns:
        that report, the number of trials, and the shares (none below ``_MIN_TRIALS_FOR_IMPORTANCE`` trials).
    """
    reached = [trial for trial in trials if trial.state in ("done", "stopped")]
    rung = min((len(trial.reports) for trial in reached), default=0)
    study = optuna.create_study(direction=objective.direction)
    for trial in reached:
        told = _as_optuna(space, trial, TrialState.COMPLETE, trial.reports[rung - 1][objective.key], {})
        if told is not None:
            study.add_trial(told)
    count = len(study.trials)
    if count < _MIN_TRIALS_FOR_IMPORTANCE:
        return rung, count, {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):  # all trials are worth the same
        return rung, count, {}
    return rung, count, {key: float(share) for key, share in found.items()}


_MIN_TRIALS_FOR_IMPORTANCE = 4
"""Trials below which no importance is told."""

_STATES = {
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def _as_optuna(
    space: Space, trial: Trial, state: TrialState, value: float | None, steps: dict[int, float]
) -> FrozenTrial | None:
    """Return a trial in Optuna's words, or None where the space does not contain its values."""
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
