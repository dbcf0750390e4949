"""What a comparison could have found, and whether two recipes are equivalent."""

import math
from pathlib import Path

import pytest
from report_runs import make_students
from scipy import stats
from typer.testing import CliRunner

from bench.power import power
from bench.recipes import effects, verdict
from wmdd.cli import app
from wmdd.errors import InputError
from wmdd.records.files import write_records
from wmdd.records.intervals import Difference, paired, welch
from wmdd.records.power import equivalence, sets_needed
from wmdd.records.schema import Record

OWN, RANDOM = [0.95, 0.90, 0.92, 0.93, 0.96], [0.90, 0.92, 0.91, 0.93, 0.94]


def sets(method: str, values: list[float]) -> dict[str, list[float]]:
    return {f"{method}-{index}": [value] for index, value in enumerate(values)}


def write(path: Path, *records: list[Record]) -> Path:
    write_records(path, [one for own in records for one in own])
    return path


def test_so_many_sets_find_the_difference_and_one_fewer_does_not() -> None:
    for difference in (0.005, 0.01, 0.03):
        n = sets_needed(0.01, 0.02, difference)
        assert n is not None

        def detects(count: int) -> float:
            return Difference(0, math.sqrt(5e-4 / count), (count - 1) * 25 / 17).detects()

        assert detects(n) <= difference < detects(n - 1)
    assert sets_needed(0.01, 0.01, 1e-6) is None
    with pytest.raises(ValueError, match="positive"):
        sets_needed(0.01, 0.01, 0)


def test_a_study_with_so_many_sets_finds_the_difference_in_four_of_five_cases() -> None:
    import numpy as np

    n = sets_needed(0.01, 0.02, 0.02)
    random = np.random.default_rng(1)
    found = [
        welch(random.normal(0.02, 0.01, n), random.normal(0, 0.02, n)).p < 0.05  # type: ignore[arg-type]
        for _ in range(2000)
    ]
    assert 0.77 < sum(found) / len(found) < 0.85


def test_the_command_says_what_the_sets_at_hand_find_and_how_many_find_a_point(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", make_students("wmdd", sets("wmdd", OWN)), make_students("random", sets("r", RANDOM))
    )

    (found,) = power([file], 0.01)

    known = welch(OWN, RANDOM)
    assert found.sets == (5, 5)
    assert found.detects == pytest.approx(
        (stats.t.ppf(0.975, known.freedom) + stats.t.ppf(0.8, known.freedom)) * known.error
    )
    assert found.needed is not None and found.needed > 5
    shown = CliRunner().invoke(app, ["bench", "power", str(file), "--difference", "1"])
    assert shown.exit_code == 0 and f"{found.needed}" in shown.output


def test_one_set_tells_no_power(tmp_path: Path) -> None:
    one = make_students("wmdd", {"w": OWN})
    file = write(tmp_path / "a.jsonl", one, make_students("random", sets("r", RANDOM)))

    (found,) = power([file], 0.01)

    assert math.isnan(found.detects) and math.isnan(found.spread[0]) and found.needed is None
    with pytest.raises(InputError, match="no setting has both random"):
        power([write(tmp_path / "b.jsonl", one)], 0.01)


def test_no_difference_found_is_not_equivalence() -> None:
    wide, narrow = [0.90, 0.94, 0.98], [0.9400, 0.9402, 0.9398, 0.9401]
    vague, sharp = welch(wide, RANDOM), welch(narrow, [0.9403, 0.9399, 0.9401])

    assert vague.p > 0.05 and not equivalence(vague, 0.01).holds
    assert equivalence(sharp, 0.01).holds
    low, high = sharp.bounds(0.9)
    assert (equivalence(sharp, 0.01).low, equivalence(sharp, 0.01).high) == (low, high)
    # Two one-sided tests: SciPy's, against the margin on either side.
    shifted = [stats.ttest_ind(narrow, [v + m for v in [0.9403, 0.9399, 0.9401]], equal_var=False, alternative=side)
               for m, side in ((0.01, "less"), (-0.01, "greater"))]  # fmt: skip
    assert equivalence(sharp, 0.01).p == pytest.approx(max(one.pvalue for one in shifted))


def test_the_same_images_under_two_recipes_are_paired_and_other_images_are_not(tmp_path: Path) -> None:
    eval_mode, batch = [0.80, 0.85, 0.90, 0.95], [0.81, 0.865, 0.91, 0.965]
    batch_recipe = {"teacher_mode": "batch"}
    one = write(
        tmp_path / "a.jsonl", make_students("random", sets("r", eval_mode)), make_students("wmdd", sets("w", OWN))
    )
    other = write(
        tmp_path / "b.jsonl",
        make_students("random", sets("r", batch), recipe=batch_recipe),
        make_students("wmdd", sets("new", RANDOM), recipe=batch_recipe),
    )

    found, differing = effects(one, other, 0.02)

    by_method = {one.effect.method: one.effect for one in found}
    assert by_method["random"].shared and not by_method["wmdd"].shared
    assert by_method["random"].found.p == pytest.approx(paired(eval_mode, batch).p)
    assert by_method["random"].found.p < 0.01 < 0.5 < welch(eval_mode, batch).p
    assert by_method["wmdd"].found.p == pytest.approx(welch(OWN, RANDOM).p)
    assert {one.effect.method: verdict(one) for one in found} == {"random": "equivalent", "wmdd": "not decided"}
    assert differing == {"teacher_mode": ("eval", "batch")}
    shown = CliRunner().invoke(app, ["bench", "compare", str(one), str(other), "--margin", "2"])
    assert shown.exit_code == 0 and "equivalent" in shown.output


def test_one_set_under_two_recipes_shows_no_effect_of_the_recipe(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", make_students("wmdd", {"w": OWN}))
    other = write(tmp_path / "b.jsonl", make_students("wmdd", {"w": RANDOM}, recipe={"lr": 0.1}))

    ((found,), _) = effects(one, other, 0.01)

    assert (found.effect.scope, found.equivalent, verdict(found)) == ("none", None, "too few sets")
