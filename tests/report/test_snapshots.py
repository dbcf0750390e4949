"""The text of all tables, so that a change of a number, a column or a caption is seen.

After an intended change: ``UPDATE_SNAPSHOTS=1 pytest tests/report/test_snapshots.py``, and read the difference in git.
"""

import os
from pathlib import Path

import pytest
from report_runs import make_everything, make_students

from wmdd.records.correct_bitmaps import pack
from wmdd.records.files import write_records
from wmdd.report.collect import Report, collect
from wmdd.report.text import markdown

SNAPSHOTS = Path(__file__).parent / "snapshots"


def compare_with(name: str, report: Report) -> None:
    found, path = markdown(report), SNAPSHOTS / f"{name}.md"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.slow
def test_the_tables_of_runs_with_everything_are_as_they_were(tmp_path: Path) -> None:
    compare_with("everything", collect([make_everything(tmp_path / "all")]))


def test_the_tables_of_methods_with_five_sets_under_two_recipes_are_as_they_were(tmp_path: Path) -> None:
    gains = {"wmdd": 0.12, "rded": 0.1, "sre2l": 0.04, "random": 0.0}
    spread = (0.0, 0.011, -0.007, 0.004, -0.01)
    records = []
    for number, (method, gain) in enumerate(gains.items()):
        for change, recipe in ((0.0, {}), (0.02, {"precision": "bf16"})):
            images = method if method == "random" else f"{method}{change}"
            right = [round(40 * (0.6 + gain + change + (1 + number % 2) * value)) for value in spread]
            made = make_students(method, {f"{images}-{n}": [one / 40] for n, one in enumerate(right)}, recipe=recipe)
            for one, count in zip(made, right, strict=True):
                bits = {"classes": 2, "test_images": (10, 30), "correct": pack([place < count for place in range(40)])}
                records.append(one.model_copy(update=bits))
    write_records(tmp_path / "all.jsonl", records)

    compare_with("five-sets", collect([tmp_path / "all.jsonl"]))
