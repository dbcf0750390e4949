"""The next values follow from the seed, the trial's number and the trials before it, and from nothing else."""

import pytest

from sweeps.objective import OBJECTIVES
from sweeps.search import importances, suggest
from sweeps.trial_log import Trial

SPACE = """
[parameters]
synthesis.bn_weight = { loguniform = [0.1, 1000.0] }
synthesis.start = { choice = ["real", "noise"] }
synthesis.jitter = { grid = [0, 1, 2], when = { synthesis.start = ["noise"] } }
"""
TOP1 = OBJECTIVES["top1"]


def play(space, kind, count, trials=()):
    """Run a sweep on paper: λ = 10 is the best."""
    trials = list(trials)
    for number in range(len(trials), count):
        values = (
            suggest(space, kind, 0, TOP1, number, trials)
            if number
            else {"synthesis.bn_weight": 1.0, "synthesis.start": "real"}
        )
        if values is None:
            break
        top1 = 1 / (1 + abs(values["synthesis.bn_weight"] - 10))
        report = {"rung": 3, "top1": top1, "seeds": [top1]}
        trials.append(Trial(number, values, "done", [{**report, "rung": 1}, {**report, "rung": 2}, report]))
    return trials


@pytest.mark.parametrize("kind", ["optuna", "random", "grid"])
def test_a_search_goes_on_as_if_it_had_not_been_stopped(make, kind):
    space = make(SPACE).space
    whole = play(space, kind, 12)
    assert len(whole) == 12
    for cut in (1, 5, 11):
        assert play(space, kind, 12, whole[:cut]) == whole


def test_another_seed_is_another_search(make):
    space = make(SPACE).space
    assert suggest(space, "random", 1, TOP1, 1, []) != suggest(space, "random", 2, TOP1, 1, [])


def test_a_grid_is_tried_once_and_then_ends(make):
    space = make(SPACE).space
    tried = [trial.values for trial in play(space, "grid", 99)[1:]]
    assert len(tried) == len(space.grid()) == 5 * (1 + 3)
    assert all(values in tried for values in space.grid())


def test_optuna_learns_from_the_trials_it_is_told(make):
    space = make("[parameters]\nsynthesis.bn_weight = { loguniform = [0.1, 1000.0] }").space

    def distance(kind):
        late = play(space, kind, 40)[20:]
        return sorted(abs(trial.values["synthesis.bn_weight"] - 10) for trial in late)[len(late) // 2]

    assert distance("optuna") < distance("random")


def test_importance_is_highest_for_the_key_that_matters(make):
    space = make(
        "[parameters]\nsynthesis.bn_weight = { loguniform = [0.1, 1000.0] }\nsynthesis.lr = { uniform = [0.1, 1.0] }"
    ).space
    trials = play(space, "random", 30)
    rung, count, found = importances(space, TOP1, trials)
    assert (rung, count) == (3, 29)  # trial 0 has no synthesis.lr here: it is no point of the space
    assert found["synthesis.bn_weight"] > 3 * found["synthesis.lr"]


def test_a_faster_recipe_that_loses_accuracy_is_never_the_best():
    time = OBJECTIVES["time"]

    def trial(number, seconds, top1):
        return Trial(number, {}, "done", [{"rung": 1, "synthesis_seconds": seconds, "top1": top1, "seeds": [top1]}])

    trials = [trial(0, 10.0, 0.9), trial(1, 1.0, 0.5), trial(2, 5.0, 0.895)]
    assert time.best(trials).number == 2
