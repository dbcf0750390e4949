import math

import pandas as pd
import pytest
from scipy import stats

from wmdd.records.intervals import holm, interval, paired, welch
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
    low, high = found.bounds()

    # Differences 0.02, 0, 0.04: mean 0.02, s = 0.02, so t = √3 and the half-width is 4.302653 · 0.02 / √3.
    assert found.mean == pytest.approx(0.02)
    assert high - found.mean == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)
    assert found.mean - low == pytest.approx(high - found.mean)
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(3), 2))
    assert found.p == pytest.approx(stats.ttest_rel(A, B).pvalue)


def test_independent_values_are_compared_by_welch() -> None:
    a, b = [0.97, 0.96, 0.98, 0.99], [0.95, 0.90, 0.94]
    found, expected = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    bounds = expected.confidence_interval(0.9)

    assert found.p == pytest.approx(expected.pvalue)
    assert found.freedom == pytest.approx(expected.df)
    assert found.bounds(0.9) == pytest.approx((bounds.low, bounds.high))


def test_values_that_cannot_tell_how_they_vary_claim_nothing() -> None:
    for found in (paired([0.9], [0.8]), paired(A, A), welch([0.9], [0.8, 0.7]), welch([0.9, 0.9], [0.8, 0.8])):
        assert math.isnan(found.p)
        assert all(math.isnan(bound) for bound in found.bounds())
    assert paired([0.9], [0.8]).mean == pytest.approx(0.1)
    with pytest.raises(ValueError, match="same, positive length"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="both sides"):
        welch([1.0], [])


def test_holm_on_a_worked_example() -> None:
    # Sorted: 0.005·4, 0.01·3, 0.03·2, 0.04·1 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def cell(method: str, values: list[float], **changes: object) -> list[dict[str, object]]:
    """Return one student of each distilled set."""
    return students_of(method, {(f"{method}-{i}", i, i): value for i, value in enumerate(values)}, **changes)


def test_every_method_is_compared_with_random_images_and_the_coreset_and_corrected_for_all_of_it() -> None:
    other = [0.9, 0.95, 0.97]
    rows = cell("random", B) + cell("herding", other) + cell("medoids", [0.93, 0.99, 0.95]) + cell("wmdd", A)
    frame = compare(pd.DataFrame(rows + cell("wmdd", A, regime="hard")))

    soft = frame[frame["regime"] == "soft"].set_index("method")
    assert list(soft.index) == ["wmdd", "herding", "medoids", "random"]
    assert soft.loc["wmdd", "difference"] == pytest.approx(0.02)
    # Six tests, of which random beside medoids and medoids beside random are one.
    medoids = [0.93, 0.99, 0.95]
    raw = [welch(*pair).p for pair in ((A, B), (other, B), (medoids, B), (A, medoids), (other, medoids))]
    adjusted = holm(raw)
    found = [*soft["p"][:3], *soft["coreset_p"][:2]]
    assert found == pytest.approx(raw)
    assert [*soft["p_adjusted"][:3], *soft["coreset_p_adjusted"][:2]] == pytest.approx(adjusted)
    assert soft.loc["random", "coreset_p_adjusted"] == pytest.approx(soft.loc["medoids", "p_adjusted"])
    assert math.isnan(soft.loc["random", "difference"])
    assert frame[frame["regime"] == "hard"]["difference"].isna().all(), "no random students under hard labels"


def test_the_interval_excludes_zero_exactly_where_the_adjusted_p_value_is_small() -> None:
    random, close, far = [0.80, 0.81, 0.79, 0.80], [0.82, 0.83, 0.81, 0.84], [0.95, 0.96, 0.94, 0.96]
    names = {"a": close, "b": far, "c": [0.815, 0.825, 0.80, 0.82], "d": random[::-1]}
    rows = [row for name, values in names.items() for row in cell(name, values)]

    frame = compare(pd.DataFrame(rows + cell("random", random))).set_index("method")

    decided = [
        (frame.loc[n, "p_adjusted"] <= 0.05, not frame.loc[n, "low"] <= 0 <= frame.loc[n, "high"]) for n in names
    ]
    assert {claimed for claimed, _ in decided} == {True, False}
    assert all(claimed == excludes for claimed, excludes in decided)
    plain = welch(names["c"], random)
    assert frame.loc["c", "high"] - frame.loc["c", "low"] > plain.bounds()[1] - plain.bounds()[0]


def test_the_same_images_under_several_names_are_one_hypothesis_and_have_no_difference() -> None:
    random = [0.90, 0.92, 0.91, 0.93]
    chosen = {("k", seed, seed): value for seed, value in enumerate([0.95, 0.96, 0.97, 0.95])}
    same = [row for name in ("herding", "k-center", "medoids") for row in students_of(name, chosen)]

    frame = compare(pd.DataFrame(same + cell("random", random))).set_index("method")

    assert frame.loc["herding", "p_adjusted"] == pytest.approx(frame.loc["herding", "p"]), "not multiplied by three"
    assert list(frame["same_as"].fillna("")) == ["", "herding", "herding", ""]
    assert frame.loc["herding", "coreset_scope"] == "same images"
    assert math.isnan(frame.loc["herding", "coreset_low"])


def test_one_set_of_a_seeded_method_has_values_and_nothing_else() -> None:
    one = {("a", 0, seed): value for seed, value in enumerate(A)}
    for random in ({("r", 0, seed): value for seed, value in enumerate(B)}, {("r", 0, 0): 0.9, ("s", 1, 0): 0.8}):
        rows = students_of("wmdd", one) + students_of("random", random)
        row = compare(pd.DataFrame(rows)).set_index("method").loc["wmdd"]

        assert math.isnan(row["top1_half_width"])
        assert (row["top1_least"], row["top1_most"], row["fixed"]) == (0.96, 0.98, False)
        assert row["scope"] == "none"
        assert row[["low", "high", "p", "p_adjusted", "detects"]].isna().all()
        assert not math.isnan(row["difference"])


def test_one_set_beside_five_random_ones_has_an_interval_about_itself_and_no_p_value() -> None:
    random = [0.90, 0.92, 0.91, 0.93, 0.94]
    one = {("a", 0, seed): value for seed, value in enumerate(A)}
    frame = compare(pd.DataFrame(students_of("wmdd", one) + cell("random", random) + cell("herding", A)))
    row = frame.set_index("method").loc["wmdd"]

    assert row["scope"] == "this set"
    assert [row["low"], row["high"]] == pytest.approx(list(welch(A, random).bounds()))
    assert row[["p", "p_adjusted", "detects", "top1_half_width"]].isna().all()
    herding = frame.set_index("method").loc["herding"]
    assert herding["p_adjusted"] == pytest.approx(herding["p"]), "a set without a p-value is no hypothesis"


def test_a_method_that_no_seed_changes_is_compared_by_its_students_and_the_sets_of_the_other() -> None:
    random = [0.90, 0.92, 0.91, 0.93, 0.94]
    told = students_of("k-center", {("k", 0, seed): value for seed, value in enumerate(A)}, seeded=False)
    seen = students_of("k-center", {("k", seed, seed): value for seed, value in enumerate(A)}, seeded=True)
    for chosen in (told, seen):
        row = compare(pd.DataFrame(chosen + cell("random", random, seeded=True))).set_index("method").loc["k-center"]

        assert (row["fixed"], row["scope"], row["sets"]) == (True, "sets", 1)
        assert row["p"] == pytest.approx(welch(A, random).p)
        assert row["top1_half_width"] == pytest.approx(interval(A).half_width)


def test_a_comparison_says_what_it_could_have_found() -> None:
    random, own = [0.90, 0.92, 0.91, 0.93, 0.94], [0.95, 0.90, 0.92, 0.93, 0.96]
    row = compare(pd.DataFrame(cell("wmdd", own) + cell("random", random))).set_index("method").loc["wmdd"]
    error, freedom = welch(own, random).error, welch(own, random).freedom

    assert row["detects"] == pytest.approx((stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)) * error)


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
    values = {("same", d, s): 0.8 + s / 10 for d in (0, 1) for s in (0, 1, 2)}

    row = compare(pd.DataFrame(students_of("herding", values))).iloc[0]

    assert (row["sets"], row["n"]) == (1, 3)
    assert row["top1_half_width"] == pytest.approx(interval([0.8, 0.9, 1.0]).half_width)


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
