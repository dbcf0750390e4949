"""``wmdd bench check`` passes what is committed and finds each fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import PROVENANCE, RECIPE, make_students
from typer.testing import CliRunner

from bench.check import check, mark
from wmdd.cli import app
from wmdd.records.files import read_records, write_records
from wmdd.records.schema import Record

RESULTS = Path(__file__).parents[2] / "bench" / "results"
CLEAN = PROVENANCE | {"dirty": False, "python": "3.11"}


def good(**changes: Any) -> list[Record]:
    """Return two methods of four sets, with three students each that trained twice as long."""
    made = []
    for method, base in (("wmdd", 0.9), ("random", 0.8)):
        sets = {f"{method}-{index}": [base + index / 100] for index in range(4)}
        about = {"provenance": CLEAN, "convergence": "converged", **changes}
        made += make_students(method, sets, **about)
        longer = {name: [values[0] + 0.002] for name, values in list(sets.items())[:3]}
        made += make_students(method, longer, view="epochs-twice", recipe={"epochs": 300}, **about)
    return made


def changed(records: list[Record], index: int, **changes: Any) -> list[Record]:
    return [one.model_copy(update=changes) if place == index else one for place, one in enumerate(records)]


def improving(records: list[Record]) -> list[Record]:
    """Return the records with longer students that are five points better, and the marks as they were."""
    return [
        one.model_copy(update={"metrics": {"top1": one.metrics["top1"] + 0.05}}) if one.view != "epochs" else one
        for one in records
    ]


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_committed_file_keeps_the_rules(file: Path) -> None:
    assert check(file) == []


FAULTS: dict[str, tuple[Callable[[list[Record]], list[Record]], str]] = {
    "a student twice": (lambda r: [*r, r[0]], "stands 2 times"),
    "a seed with two sets": (lambda r: changed(r, 1, distillation_seed=0), "seed 0 was used twice, for 2 sets"),
    "mixed revisions": (
        lambda r: changed(r, 0, provenance=CLEAN | {"revision": "9" * 40}),
        "mixes revisions: 888888888888 (13), 999999999999 (1)",
    ),
    "uncommitted changes": (lambda r: changed(r, 0, provenance=PROVENANCE | {"python": "3.11"}), "uncommitted changes"),
    "mixed versions": (lambda r: changed(r, 0, provenance=CLEAN | {"torch": "1.0"}), "mixes versions of torch"),
    "a recipe chosen on the test set": (lambda r: changed(r, 0, tuned_on="test"), "was chosen on the test set"),
    "best epoch": (
        lambda r: changed(r, 0, recipe=RECIPE | {"checkpoint": "best"}),
        "measured at the best epoch; only the last",
    ),
    "hold-out and test set": (
        lambda r: changed(r, 0, evaluated_on="holdout"),
        "some students were measured on held-out",
    ),
    "another test set": (lambda r: changed(r, 0, test_images=(3, 4)), "different numbers of test images"),
    "two recipes": (lambda r: changed(r, 0, recipe=RECIPE | {"lr": 0.5}), "students of 2 recipes"),
    "two teachers": (lambda r: changed(r, 0, recipe=RECIPE | {"teacher": "5" * 64}), "2 teachers that some sets share"),
    "no mark": (lambda r: changed(r, 0, convergence=None), "is converged (+0.2) and bears no mark"),
    "an unconverged row without its mark": (improving, "is improving (+5.2) and bears the mark 'converged'"),
    "convergence that was not measured": (
        lambda r: [one for one in r if one.view == "epochs"],
        "is not checked and bears the mark 'converged'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found(fault: str, tmp_path: Path) -> None:
    spoil, words = FAULTS[fault]
    file = tmp_path / "records.jsonl"
    write_records(file, good())
    assert check(file) == []

    write_records(file, spoil(good()))

    assert any(words in problem for problem in check(file)), check(file)
    shown = CliRunner().invoke(app, ["bench", "check", str(file)])
    assert shown.exit_code == 1 and words in shown.output


def test_a_recipe_that_was_chosen_on_the_hold_out_may_be_measured_on_the_test_set(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", good(tuned_on="holdout", trials=8))

    assert check(tmp_path / "a.jsonl") == []


def test_marks_are_written_as_the_students_of_the_file_say(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_records(file, improving(good(convergence=None)))

    assert mark(file) == 14
    assert {record.convergence for record in read_records(file)[0]} == {"improving"}
    assert check(file) == [] and mark(file) == 0
