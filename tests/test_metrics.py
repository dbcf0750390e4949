import math

import pandas as pd
import pytest
from scipy import stats

from wmdd.metrics import compare, holm, interval, paired, paired_by_seed

A, B = [0.97, 0.96, 0.98], [0.95, 0.96, 0.94]


def test_an_interval_is_the_t_interval_computed_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])

    # s = 1, and the 97.5 % quantile of Student's t with 2 degrees of freedom is 4.302653 in any table.
    assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_the_level_of_an_interval_counts() -> None:
    assert interval([1.0, 2.0, 3.0], level=0.9).half_width == pytest.approx(2.919986 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    found = interval([0.5])

    assert found.mean == 0.5
    assert math.isnan(found.half_width)
    assert math.isnan(found.std)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_a_paired_difference_agrees_with_the_hand_and_with_scipy() -> None:
    found = paired(A, B)

    # Differences 0.02, 0, 0.04: mean 0.02, s = 0.02, so t = √3 and the half-width is 4.302653 · 0.02 / √3.
    assert found.mean == pytest.approx(0.02)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(3), 2))
    assert found.p == pytest.approx(stats.ttest_rel(A, B).pvalue)
    assert found.n == 3


def test_pairs_that_cannot_vary_are_told_as_such() -> None:
    one, equal, shifted = paired([0.9], [0.8]), paired(A, A), paired([0.3, 0.4, 0.5], [0.1, 0.2, 0.3])

    assert one.n == 1
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert (equal.mean, equal.low, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)
    assert shifted.low == shifted.high == pytest.approx(0.2)
    assert shifted.p == 0.0
    with pytest.raises(ValueError, match="same, positive length"):
        paired([1.0], [1.0, 2.0])


def test_pairs_are_formed_by_both_seeds_and_distillation_seeds_are_counted() -> None:
    a = {(0, 0): 0.97, (0, 1): 0.96, (1, 0): 0.98, (1, 1): 0.1}
    b = {(1, 0): 0.94, (0, 1): 0.96, (0, 0): 0.95, (7, 1): 0.9}

    found = paired_by_seed(a, b)

    assert found is not None
    assert found.mean == pytest.approx(0.02)
    assert (found.n, found.distillation_seeds) == (3, 2)
    assert paired_by_seed(a, {(9, 9): 0.5}) is None


def test_holm_on_a_worked_example() -> None:
    # Sorted: 0.005·4, 0.01·3, 0.03·2, 0.04·1 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_method_of_a_setting_is_held_against_random_and_corrected_for_their_number() -> None:
    def students(method: str, values: list[float], regime: str = "soft") -> list[dict[str, object]]:
        setting = {"dataset": "digits", "classes": 10, "resolution": 16, "ipc": 1, "network": "net", "regime": regime}
        about = {"method": method, "name": "", "baseline": method != "wmdd", "distillation_seed": 0}
        return [{**setting, **about, "student_seed": s, "metrics": {"top1": v}} for s, v in enumerate(values)]

    other = [0.9, 0.95, 0.97]
    frame = compare(
        pd.DataFrame(
            students("random", B) + students("herding", other) + students("wmdd", A) + students("wmdd", A, "hard")
        )
    )

    soft = frame[frame["regime"] == "soft"].set_index("method")
    assert list(soft.index) == ["wmdd", "herding", "random"]
    assert soft.loc["wmdd", "difference"] == pytest.approx(0.02)
    raw = [paired(A, B).p, paired(other, B).p]
    assert list(soft["p"][:2]) == pytest.approx(raw)
    assert list(soft["p_holm"][:2]) == pytest.approx(holm(raw))
    assert soft.loc["random", ["difference", "p"]].isna().all()
    assert frame[frame["regime"] == "hard"]["difference"].isna().all(), "no random students under hard labels"
