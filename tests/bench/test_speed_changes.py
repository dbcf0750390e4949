"""``wmdd bench compare`` of speeds."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.speed_changes import changes
from wmdd.cli import app
from wmdd.records.files import write_records
from wmdd.records.schema import SpeedRecord


def speed(rate: float, spread: float = 0.05, **about: Any) -> SpeedRecord:
    given: dict[str, Any] = {"kind": "throughput", "stage": "synthesis", "engine": "wmdd", "dataset": "synthetic"}
    given |= {"network": "resnet18", "resolution": 64, "unit": "img·iter/s", "setup": {"batch": 100}}
    given |= {"metrics": {"rate": rate, "rate_low": rate * (1 - spread), "rate_high": rate * (1 + spread)}}
    return SpeedRecord.model_validate(given | {"provenance": {"cpu": "Xeon"}} | about)


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(130.0, "faster"), (80.0, "slower"), (104.0, "within the spread"), (97.0, "within the spread")],
)
def test_a_change_counts_where_all_repeats_are_beyond_all_others(rate: float, verdict: str) -> None:
    (found,) = changes([speed(100.0)], [speed(rate)])

    assert found.verdict == verdict and found.ratio == pytest.approx(rate / 100)


def test_only_the_same_work_is_compared_and_other_hardware_is_said() -> None:
    old = [speed(100.0), speed(100.0, stage="students")]
    new = [speed(50.0, setup={"batch": 50}), speed(200.0, stage="students", provenance={"cpu": "EPYC"})]

    (found,) = changes(old, new)

    assert found.after.stage == "students" and found.elsewhere


def test_the_command_prints_old_new_and_ratio_and_refuses_files_without_common_work(tmp_path: Path) -> None:
    speeds = {"old": speed(100.0), "new": speed(80.0), "fast": speed(12345.0), "other": speed(1.0, stage="statistics")}
    for name, measured in speeds.items():
        write_records(tmp_path / f"{name}.jsonl", [measured])

    def run(*names: str) -> Any:
        places = [str(tmp_path / f"{name}.jsonl") for name in names]
        return CliRunner().invoke(app, ["bench", "compare", *places], env={"COLUMNS": "200"})

    shown = run("old", "new")
    assert shown.exit_code == 0 and "0.80×" in shown.output and "1 of 1 slower" in shown.output
    assert "12,345 [11,728, 12,962] img·iter/s" in run("old", "fast").output, "as in the table of a report"
    assert "no work in common" in str(run("old", "other").exception)
