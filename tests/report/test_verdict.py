"""What a report concludes: the best method, those as good, what was detectable, and what was never measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_students

from wmdd.records.files import write_records
from wmdd.records.intervals import paired, welch
from wmdd.report.collect import Report, collect
from wmdd.report.collect_tables import tables
from wmdd.report.gaps import gaps
from wmdd.report.mllog import mllog
from wmdd.report.recipes import effects
from wmdd.report.table import Table
from wmdd.report.verdict import summary, verdicts

RESULTS = Path(__file__).parents[2] / "bench" / "results"
RANDOM = [0.80, 0.81, 0.79, 0.80, 0.80]


def sets(name: str, values: list[float]) -> dict[str, list[float]]:
    return {f"{name}{number}": [value] for number, value in enumerate(values)}


def report_of(folder: Path, **methods: Any) -> Report:
    """Return a report of methods, by the accuracies of their sets, one student each."""
    records = [one for name, values in methods.items() for one in make_students(name, sets(name, values))]
    write_records(folder / "all.jsonl", records)
    return collect([folder / "all.jsonl"])


def named(report: Report, title: str) -> list[Table]:
    return [table for table in tables(report) if table.title == title]


def test_the_verdict_names_the_best_those_as_good_those_behind_and_the_detectable_difference(tmp_path: Path) -> None:
    close = [0.905, 0.898, 0.901, 0.910, 0.894]
    report = report_of(tmp_path, wmdd=[0.90, 0.91, 0.89, 0.90, 0.91], rded=close, random=RANDOM)

    (verdict,) = verdicts(report)

    assert verdict.methods("best") == ["wmdd"] and verdict.methods("tie") == ["rded"]
    assert verdict.methods("") == ["random"]
    first, *others = verdict.sentences()
    assert first.startswith("Best: wmdd 90.2 ± 1.0 %, +10.2 [")
    # Two others: both comparisons at 2.5 %.
    expected = 100 * welch([0.90, 0.91, 0.89, 0.90, 0.91], close).detects(1 - 0.05 / 2)
    assert others == [
        "Not distinguishable from wmdd: rded",
        "Behind it: random",
        "random is 3rd of 3",
        f"A true difference of {expected:.1f} points between wmdd and rded would be found 4 times in 5; smaller ones"
        " are often missed",
    ]
    (table,) = named(report, "Accuracy")
    rows = {row[table.columns.index("Method")]: row for row in table.rows}
    assert rows["rded"][table.columns.index("Detects vs best, points")] == f"{expected:.1f}", "one number, twice"


def test_the_headline_has_the_margin_over_the_runner_up_with_the_interval_and_p_of_the_verdict(tmp_path: Path) -> None:
    own, next_one = [0.90, 0.91, 0.89, 0.90, 0.91], [0.86, 0.87, 0.85, 0.86, 0.85]
    report = report_of(tmp_path, wmdd=own, rded=next_one, random=RANDOM)

    (verdict,) = verdicts(report)

    found = welch(own, next_one)
    low, high = (100 * bound for bound in found.bounds(1 - 0.05 / 2))
    assert verdict.methods("") == ["rded", "random"] and low > 0
    margin = f"; +{100 * found.mean:.1f} [{low:.1f}, {high:.1f}] over rded, next by mean (p < 0.001)"
    assert 2 * found.p < 0.001 and verdict.sentences()[0].endswith(margin)


def test_a_method_that_stays_with_a_lower_mean_is_explained_and_all_verdicts_have_a_summary(tmp_path: Path) -> None:
    wide = [0.95, 0.70, 0.90, 0.75, 0.94]
    report = report_of(tmp_path, wmdd=[0.90, 0.91, 0.89, 0.90, 0.91], rded=[0.87, 0.88, 0.87, 0.86, 0.87], cda=wide)

    (verdict,) = verdicts(report)

    assert (verdict.methods("tie"), verdict.methods("")) == (["cda"], ["rded"])
    told = verdict.sentences()
    assert "Behind it: rded" in told
    assert "cda has a lower mean than rded, but a wider spread that does not rule it out" in told
    assert summary([verdict]) == []
    assert summary([verdict, verdict]) == [
        "No method is shown to be ahead of all others in 2 of 2 settings (soft labels 2 of 2)."
    ]


def test_one_set_beats_nobody(tmp_path: Path) -> None:
    write_records(tmp_path / "all.jsonl", make_students("wmdd", {"w": [0.99, 0.98, 0.99]}))
    random = make_students("random", sets("r", RANDOM))
    write_records(tmp_path / "random.jsonl", random)

    (verdict,) = verdicts(collect([tmp_path]))

    assert verdict.sentences()[0].startswith("Highest mean: wmdd")
    assert "One set says nothing about another distillation" in verdict.sentences()
    (bar, _) = verdict.forest().bars
    assert bar.hollow and bar.wide is None and bar.thin is not None, "its interval is of this set only"


def test_the_forest_shows_both_intervals_to_one_scale_with_the_best_first(tmp_path: Path) -> None:
    report = report_of(tmp_path, wmdd=[0.90, 0.91, 0.89], rded=[0.70, 0.72, 0.71], random=[0.8, 0.81, 0.79])

    ((verdict,), forest) = verdicts(report), verdicts(report)[0].forest()

    assert [bar.method for bar in forest.bars] == ["wmdd", "random", "rded"]
    row = verdict.best
    low, high = (100 * row[key] for key in ("low", "high"))
    at = {tick: place for place, tick in forest.ticks}
    assert forest.zero == at["0"]
    bar = forest.bars[0]
    assert bar.wide and bar.thin and bar.wide[0] < bar.thin[0] < bar.at < bar.thin[1] < bar.wide[1], "adjusted: wider"
    scale = (at["+10"] - at["0"]) / 10
    assert bar.wide == pytest.approx((at["0"] + scale * low, at["0"] + scale * high))


def test_a_recipe_is_compared_on_the_same_images_by_pairs_and_on_others_by_sets(tmp_path: Path) -> None:
    before, after, own, new = (
        [0.80, 0.85, 0.90, 0.95],
        [0.81, 0.865, 0.91, 0.965],
        [0.9, 0.91, 0.89],
        [0.95, 0.96, 0.94],
    )
    bf16 = {"recipe": {"precision": "bf16"}}
    records = make_students("random", sets("r", before)) + make_students("wmdd", sets("old", own))
    records += make_students("random", sets("r", after), **bf16) + make_students("wmdd", sets("new", new), **bf16)
    write_records(tmp_path / "all.jsonl", records)

    report = collect([tmp_path / "all.jsonl"])

    found = {one.method: one for one in effects(report.accuracy, report.recipes)}
    assert found["random"].shared and found["random"].found.p == pytest.approx(paired(after, before).p)
    assert not found["wmdd"].shared and found["wmdd"].found.p == pytest.approx(welch(new, own).p)
    (table,) = named(report, "Effect of the recipe")
    assert {tuple(row[1:3]) for row in table.rows} == {("A → B", "precision None → bf16")}
    assert [row[-1] for row in table.rows] == ["3 / 3", "4, paired"]
    assert list(report.accuracy["n"]) == [3, 4, 3, 4], "no average is taken across recipes"


def test_the_effect_of_a_recipe_shows_the_means_of_exactly_the_compared_sets_in_the_order_of_the_recipes(
    tmp_path: Path,
) -> None:
    bf16 = {"recipe": {"precision": "bf16"}}
    records = make_students("random", sets("r", [0.5, 0.7, 0.6, 0.1])) + make_students("wmdd", sets("w", [0.9] * 4))
    records += make_students("random", sets("r", [0.5, 0.72, 0.64]), **bf16)
    records += make_students("wmdd", sets("v", [0.8, 0.81, 0.82]), **bf16)
    write_records(tmp_path / "all.jsonl", records)

    (table,) = named(collect([tmp_path / "all.jsonl"]), "Effect of the recipe")

    at = [table.columns.index(name) for name in ("Method", "First, %", "Second, %", "Sets, first / second")]
    assert [[row[place] for place in at] for row in table.rows] == [
        ["wmdd", "90.0", "81.0", "4 / 3"],
        ["random", "60.0", "62.0", "3, paired"],
    ]


def test_what_was_never_measured_is_said(tmp_path: Path) -> None:
    told = dict(gaps(report_of(tmp_path, wmdd=[0.90, 0.91, 0.89], random=[0.8, 0.81, 0.79])))

    (phrases,) = told.values()
    for phrase in ("whether students have converged", "methods other than wmdd and random"):
        assert phrase in phrases
    assert "students of another network than convnet3x32" in phrases


@pytest.mark.slow
def test_all_committed_records_make_one_report_with_the_figures_that_its_sections_show() -> None:
    report = collect(sorted(RESULTS.glob("*.jsonl")))

    assert len(verdicts(report)) >= 19
    text = "\n".join(f"{one.section.title}, {one.setting}: {'. '.join(one.sentences())}" for one in verdicts(report))
    assert "recipe A, IPC 10, hard labels: Best: wmdd" in text
    assert named(report, "Effect of the recipe")


def test_students_are_told_as_event_lines_of_mlperf(tmp_path: Path) -> None:
    report = report_of(tmp_path, wmdd=[0.90, 0.91], random=[0.8, 0.81])

    lines = mllog(report).splitlines()

    assert all(line.startswith(":::MLLOG {") for line in lines)
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert all(
        event.keys() == {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
        and {"file", "lineno"} <= event["metadata"].keys()
        for event in events
    )
    accuracies = [event["value"] for event in events if event["key"] == "eval_accuracy"]
    assert sorted(accuracies) == [0.8, 0.81, 0.90, 0.91]
    runs = [event["key"] for event in events if event["key"].startswith("run_")]
    assert runs == ["run_start", "run_stop"] * 4
    started, stopped = (next(event["time_ms"] for event in events if event["key"] == key) for key in runs[:2])
    assert stopped - started == 4000, "four seconds, as the record says"
