import math

import pandas as pd
import pytest
from scipy import stats

from wmdd.records.intervals import holm, interval, paired, paired_by_seed
from wmdd.records.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from wmdd.report.comparison import compare

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


def test_pairs_are_formed_by_both_seeds_and_one_distillation_seed_counts_students() -> None:
    a = {(0, 0): 0.97, (0, 1): 0.96, (0, 2): 0.98, (1, 1): 0.1}
    b = {(0, 2): 0.94, (0, 1): 0.96, (0, 0): 0.95, (7, 1): 0.9}

    found = paired_by_seed(a, b)

    assert found is not None
    assert (found.mean, found.p) == (pytest.approx(0.02), pytest.approx(paired(A, B).p))
    assert (found.n, found.distillation_seeds) == (3, 1)
    assert paired_by_seed(a, {(9, 9): 0.5}) is None


def test_differences_are_averaged_within_a_distillation_seed_so_that_students_are_not_counted_as_evidence() -> None:
    a = {(0, 0): 0.94, (0, 1): 0.92, (1, 2): 0.95, (1, 3): 0.97, (2, 4): 0.96, (2, 5): 0.90}
    b = {key: 0.90 for key in a}

    found = paired_by_seed(a, b)

    # Within seeds 0.03, 0.06, 0.03: mean 0.04, s² = (2 · 0.01² + 0.02²) / 2 = 0.0003, t(97.5 %; 2) = 4.302653.
    assert found is not None
    assert found.mean == pytest.approx(0.04)
    assert found.high - found.mean == pytest.approx(4.302653 * math.sqrt(0.0003 / 3), rel=1e-6)
    assert (found.n, found.distillation_seeds) == (6, 3)


def test_holm_on_a_worked_example() -> None:
    # Sorted: 0.005·4, 0.01·3, 0.03·2, 0.04·1 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_method_of_a_setting_is_held_against_random_and_corrected_for_their_number() -> None:
    def students(method: str, values: list[float], regime: str = "soft") -> list[dict[str, object]]:
        setting = {"dataset": "digits", "classes": 10, "resolution": 16, "ipc": 1, "network": "net", "view": "epochs"}
        about = {"method": method, "name": "", "baseline": method != "wmdd", "distillation_seed": 0, "images": method}
        about["regime"] = regime
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


def test_methods_are_held_against_the_real_coreset_as_well() -> None:
    rows = [students_of(m, {(m, 0, s): v for s, v in enumerate(vs)}) for m, vs in (("wmdd", A), ("medoids", B))]
    frame = compare(pd.DataFrame([row for some in rows for row in some])).set_index("method")
    expected = paired(A, B)
    found = frame.loc["wmdd", ["coreset_difference", "coreset_low", "coreset_high"]]
    assert list(found) == pytest.approx([expected.mean, expected.low, expected.high])
    assert frame.loc["medoids", "coreset_difference"] != frame.loc["medoids", "coreset_difference"]
    assert frame["difference"].isna().all(), "no random images were measured"


def students_of(method: str, values: dict[tuple[str, int, int], float], **changes: object) -> list[dict[str, object]]:
    """Return students by (distilled set, distillation seed, student seed)."""
    setting = {"dataset": "digits", "classes": 10, "resolution": 16, "ipc": 1, "network": "net", "regime": "soft"}
    about = {**setting, "view": "epochs", "method": method, "name": "", "baseline": method != "wmdd", **changes}
    return [
        {**about, "images": images, "distillation_seed": d, "student_seed": s, "metrics": {"top1": value}}
        for (images, d, s), value in values.items()
    ]


def test_the_interval_is_over_the_means_of_distinct_distilled_sets() -> None:
    values = {("a", 0, 0): 0.90, ("a", 0, 1): 0.92, ("b", 1, 2): 0.92, ("b", 1, 3): 0.94, ("c", 2, 4): 0.95}

    row = compare(pd.DataFrame(students_of("wmdd", values))).iloc[0]

    # The sets reach 0.91, 0.93, 0.95: s = 0.02, not that of five students.
    assert row["top1"] == pytest.approx(0.93)
    assert row["top1_half_width"] == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)
    assert (row["sets"], row["students"], row["n"]) == (3, 2, 5)


def test_a_selection_that_no_seed_changes_is_one_set_however_often_it_was_distilled() -> None:
    values = {("same", seed, seed): value for seed, value in enumerate([0.8, 0.9, 1.0])}

    row = compare(pd.DataFrame(students_of("herding", values))).iloc[0]

    assert (row["sets"], row["students"], row["n"]) == (1, 3, 3)
    assert row["top1_half_width"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


def test_the_same_student_on_the_same_images_counts_once() -> None:
    values = {("same", 0, 0): 0.8, ("same", 1, 0): 0.8, ("same", 0, 1): 0.9, ("same", 1, 1): 0.9}

    row = compare(pd.DataFrame(students_of("herding", values))).iloc[0]

    assert (row["sets"], row["n"]) == (1, 2)
    assert row["top1_half_width"] == pytest.approx(interval([0.8, 0.9]).half_width)


def test_views_are_not_averaged() -> None:
    frame = pd.DataFrame(
        students_of("wmdd", {("a", 0, 0): 0.9}) + students_of("wmdd", {("a", 0, 0): 0.5}, view="plain")
    )

    assert dict(zip(compare(frame)["view"], compare(frame)["top1"], strict=True)) == {"epochs": 0.9, "plain": 0.5}


def test_robust_scores_are_those_computed_by_hand() -> None:
    assert hard_label_recovery(0.95, 0.75) == pytest.approx(0.2)
    assert improvement_over_random(0.9, 0.8) == pytest.approx(0.1)
    # α = (0.1 − 0.2) / 2 = −0.05: (0.951229 − 0.367879) / (2.718282 − 0.367879) = 0.583350 / 2.350402.
    assert label_robust_score(0.75, 0.9, 0.95, 0.8) == pytest.approx(0.248192, abs=1e-5)
    # All weight on IOR: α = 0.1, (1.105171 − 0.367879) / 2.350402.
    assert label_robust_score(0.75, 0.9, 0.95, 0.8, weight=1) == pytest.approx(0.313688, abs=1e-5)
    # β = (0.1 + 0.3) / 2 = 0.2: (1.221403 − 0.367879) / 2.350402.
    assert augmentation_robust_score(0.9, 0.8, 0.7, 0.4) == pytest.approx(0.363140, abs=1e-5)
    assert augmentation_robust_score(1, 0, 1, 0) == pytest.approx(1)
    assert label_robust_score(0, 0, 1, 1) == pytest.approx(0)


def test_percentages_are_refused_by_the_scores() -> None:
    with pytest.raises(ValueError, match="accuracies from 0 to 1"):
        label_robust_score(75, 90, 95, 80)
    with pytest.raises(ValueError, match="accuracies from 0 to 1"):
        augmentation_robust_score(0.9, 0.8, 70, 0.4)
