"""What a confirmation says, on paper: no training."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from sweeps import best, confirm, page, trial
from sweeps.objective import OBJECTIVES
from sweeps.trial_log import Log, Trial
from wmdd.config.loading import load_config
from wmdd.errors import InputError

SPACE = "[parameters]\nsynthesis.bn_weight = { loguniform = [0.1, 1000.0] }"
TOP1 = OBJECTIVES["top1"]


def done(number, weight, value, key="top1", **of):
    return Trial(number, {"synthesis.bn_weight": weight}, "done", [{"rung": 1, key: value, "seeds": [value]}], **of)


def repeats(values, key="top1"):
    """Return the log of a confirmation: values by trial and seed."""
    pairs = [(of, repeat, value) for of, own in values.items() for repeat, value in enumerate(own, start=1)]
    return [done(n, 1.0, value, key, of=of, repeat=repeat) for n, (of, repeat, value) in enumerate(pairs)]


@pytest.mark.parametrize(("name", "sign"), [("top1", 1), ("w2", -1)])
def test_each_recipe_is_compared_with_trial_0_by_pairs_and_adjusted_by_holm(name, sign):
    draw = np.random.default_rng(0)
    preset = 0.5 + 0.02 * draw.normal(size=10)
    gains = {3: 0.03, 5: 0.004, 8: -0.02}
    values = {0: preset} | {of: preset + sign * gain + 0.01 * draw.normal(size=10) for of, gain in gains.items()}
    found = confirm.confirmation(OBJECTIVES[name], repeats(values, OBJECTIVES[name].key))
    assert found.complete and found.winner == 3 and [one.number for one in found.comparisons] == [3, 5, 8]
    p = {of: ttest_rel(values[of], preset).pvalue for of in gains}
    ranked = sorted(p, key=p.get)
    expected, largest = {}, 0.0
    for position, of in enumerate(ranked):
        largest = max(largest, min(1, (3 - position) * p[of]))
        expected[of] = largest
    for one in found.comparisons:
        assert one.adjusted == pytest.approx(expected[one.number])
        assert one.difference.mean == pytest.approx(sign * (values[one.number] - preset).mean())
        assert (one.low <= 0 <= one.high) == (one.adjusted > 0.05)
    best_value = found.comparisons[0].value
    half = t.ppf(0.975, 9) * values[3].std(ddof=1) / np.sqrt(10)
    assert best_value.half_width == pytest.approx(half) and best_value.n == 10


def test_a_gain_that_seeds_explain_confirms_nothing():
    draw = np.random.default_rng(1)
    values = {of: 0.5 + 0.02 * draw.normal(size=6) for of in range(5)}
    found = confirm.confirmation(TOP1, repeats(values))
    assert found.winner == 0 and confirm.lines(TOP1, found)[0].startswith("Nothing beats the unchanged config")


def test_only_seeds_that_both_have_are_pairs_and_an_unfinished_confirmation_says_so():
    log = repeats({0: [0.5, 0.52, 0.51, 0.53], 2: [0.6, 0.63, 0.61, 0.62]})
    log[-1] = replace(log[-1], state="running", reports=[])
    found = confirm.confirmation(TOP1, log)
    assert (found.done, found.total, found.comparisons[0].value.n) == (7, 8, 3)
    assert confirm.lines(TOP1, found)[0] == "Confirmation: 7 of 8 repeats are finished; resume `wmdd sweep confirm`."


def test_the_best_trials_that_differ_from_trial_0_are_repeated_with_seeds_of_their_own(make):
    sweep = make(SPACE)
    setup = trial.SweepSetup(sweep.config, sweep.space.budget, TOP1)
    same = sweep.config.synthesis.bn_weight
    trials = [done(0, same, 0.9), done(1, same, 0.99), done(2, 5.0, 0.95), done(3, 5.0, 0.94), done(4, 7.0, 0.93)]
    trials.append(replace(done(5, 9.0, 0.999), state="stopped"))
    assert [one.number for one in confirm.candidates(setup, trials, 5)] == [2, 4]
    assert [one.number for one in confirm.candidates(setup, trials, 1)] == [2]
    with pytest.raises(InputError, match="trial 0 is not complete"):
        confirm.candidates(setup, [replace(trials[0], state="running")], 1)
    proxies = [replace(setup, repeat=repeat).proxy({}) for repeat in range(4)]
    students = [range(one.student.first_seed, one.student.first_seed + one.student.seeds) for one in proxies]
    assert len({one.seed for one in proxies}) == 4
    assert len({seed for own in students for seed in own}) == 4 * sweep.space.budget.student_seeds


@pytest.mark.parametrize("gain", [0.05, 0.0])
def test_the_best_recipe_is_the_confirmed_one_or_the_preset(make, tmp_path, gain):
    sweep, log = make(SPACE), Log(tmp_path / "sweep")
    with log.held(sweep.identity()):
        second = done(1, 5.0, 0.91)
        second.last["seeds"] = [0.90, 0.92]
        for one in (done(0, sweep.config.synthesis.bn_weight, 0.9), second):
            log.write(one)
    found = best.best(log.path, measure=False)
    assert "# Unconfirmed: " in found and "bn_weight = 5" in found
    kept, draw = Log(log.path / "confirm"), np.random.default_rng(2)
    with kept.held(sweep.identity()):
        preset = 0.9 + 0.01 * draw.normal(size=5)
        for one in repeats({0: preset, 1: preset + gain + 0.004 * draw.normal(size=5)}):
            kept.write(one)
    found = best.best(log.path, measure=False)
    (tmp_path / "best.toml").write_text(found)
    chosen = load_config(tmp_path / "best.toml").synthesis.bn_weight
    page.write_summary(sweep, log)
    with open(log.path / "summary.csv") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert rows["1"]["top1"] == "91.00" and float(rows["1"]["synthesis.bn_weight"]) == 5
    assert (rows["0"]["vs trial 0"], rows["1"]["vs trial 0"], rows["1"]["students"]) == ("", "+1.00", "90.00–92.00")
    told = (log.path / "summary.md").read_text()
    assert "## Confirmation" in told and ("Nothing beats" in told) == (gain == 0)
    if gain:
        assert chosen == 5.0 and found.startswith("# Confirmed on fresh seeds: trial 1.\n")
    else:
        assert chosen == sweep.config.synthesis.bn_weight
        assert found.startswith("# Nothing of 2 trials beats the config: trial 0, the unchanged config.\n")
