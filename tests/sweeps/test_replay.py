"""ASHA on a complete log: what it saves, and what it loses."""

import pytest

from sweeps.objective import OBJECTIVES
from sweeps.replay import replay
from sweeps.space import Budget
from sweeps.trial_log import Trial
from wmdd.errors import InputError

BUDGET, TOP1 = Budget(), OBJECTIVES["top1"]


def log(count, late=False):
    """Return complete trials: number n reaches n / count. With ``late``, the best one looks like the worst at first."""
    trials = []
    for number in range(count):
        values = [number / count] * 3
        if late and number == count - 1:
            values = [-1.0, -1.0, 1.0]
        reports = [{"rung": r + 1, "top1": v, "seconds": 2.0**r, "seeds": [v]} for r, v in enumerate(values)]
        trials.append(Trial(number, {}, "done", reports))
    return trials


@pytest.mark.parametrize("concurrent", [1, 4])
def test_a_replay_saves_seconds_and_keeps_a_trial_that_is_the_best_throughout(concurrent):
    found = [replay(log(16), TOP1, BUDGET, seed, concurrent) for seed in range(10)]
    assert all(one.kept and one.loss == 0 and one.stopped > 0 for one in found)
    assert all(0 < one.saved < 0.75 for one in found)  # a stopped trial still costs a quarter
    assert found == [replay(log(16), TOP1, BUDGET, seed, concurrent) for seed in range(10)]
    assert len({one.saved for one in found}) > 1  # the order of the trials matters


def test_a_replay_tells_when_the_best_trial_is_lost():
    found = [replay(log(16, late=True), TOP1, BUDGET, seed) for seed in range(10)]
    lost = [one for one in found if not one.kept]
    assert lost and all(one.loss == pytest.approx(1 - 14 / 16) for one in lost)


def test_a_replay_needs_a_complete_log():
    trials = log(4)
    trials[2].reports.pop()
    with pytest.raises(InputError, match="every trial ran to its end"):
        replay(trials, TOP1, BUDGET, 0)
