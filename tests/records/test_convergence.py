from pathlib import Path

import pytest
from report_runs import make_students

from wmdd.records.convergence import convergence, with_twice
from wmdd.records.files import write_records
from wmdd.report.collect import collect
from wmdd.report.collect_tables import tables
from wmdd.report.verdict import verdicts

ONCE = {(name, 0): value for name, value in (("a", 0.70), ("b", 0.72), ("c", 0.74), ("d", 0.10))}


@pytest.mark.parametrize(
    ("change", "state"), [(0.009, "converged"), (0.011, "improving"), (-0.02, "improving"), (0.0, "converged")]
)
def test_students_have_converged_if_twice_the_updates_move_the_mean_of_three_by_less_than_a_point(
    change: float, state: str
) -> None:
    spread = {"a": 0.01, "b": -0.02, "c": 0.01}
    twice = {(name, 0): ONCE[name, 0] + change + spread[name] for name in spread}

    found = convergence(ONCE, twice)

    assert (found.state, found.change) == (state, pytest.approx(change))


def test_two_students_or_students_of_other_sets_say_nothing() -> None:
    assert convergence(ONCE, {("a", 0): 0.70, ("b", 0): 0.72}).state == "not checked"
    assert convergence(ONCE, {(name, 1): 0.70 for name in "abc"}).state == "not checked"
    assert with_twice(["updates", "plain"]) == ("updates", "plain", "updates-twice")


def test_a_report_marks_students_that_improve_and_shows_no_row_of_longer_ones(tmp_path: Path) -> None:
    sets, better = {n: [v] for (n, _), v in ONCE.items()}, {n: [v + 0.05] for (n, _), v in ONCE.items()}
    random = {f"r{n}": [v] for (n, _), v in ONCE.items()}
    records = make_students("wmdd", sets) + make_students("wmdd", better, view="epochs-twice", recipe={"epochs": 300})
    records += make_students("random", random)
    records += make_students("random", random, view="epochs-twice", recipe={"epochs": 300})
    write_records(tmp_path / "all.jsonl", records)

    report = collect([tmp_path / "all.jsonl"])

    (accuracy,) = (table for table in tables(report) if table.title == "Accuracy")
    assert [(row[5], row[-1]) for row in accuracy.rows] == [
        ("wmdd", "improving (+5.0)"),
        ("random", "converged (+0.0)"),
    ]
    keys = list(accuracy.terms)
    assert keys.index("updates") == keys.index("epochs") + 1
    (verdict,) = verdicts(report)
    assert "Still improving (+5.0) when trained twice as long: wmdd" in verdict.sentences()
    write_records(tmp_path / "all.jsonl", make_students("wmdd", sets))
    (accuracy,) = (table for table in tables(collect([tmp_path / "all.jsonl"])) if table.title == "Accuracy")
    assert "Whether students have converged was not checked." in accuracy.caption
