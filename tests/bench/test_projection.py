"""Projections: their arithmetic on hand-made records, what they rest on, and what they refuse."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import projection
from wmdd.cli import app
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.errors import InputError
from wmdd.records.files import write_records
from wmdd.records.schema import SpeedRecord

SOURCE = Path("speeds.jsonl")

KEYS = [
    "compute.precision=fp32",
    "teacher.network=resnet18",
    "synthesis.iterations=1000",
    "synthesis.classes_per_group=10",
    "barycenter.starts=4",
    "labels.regimes=['soft']",
    "student.networks=['resnet18']",
    "student.seeds=3",
    "student.epochs=300",
    "student.batch_size=100",
    "student.baselines=['random']",
    "student.baseline_sets=1",
]


@pytest.fixture
def config() -> Config:
    return load_config("imagenet-1k", KEYS)


def speed(stage: Any, rate: float, unit: str, **setup: Any) -> SpeedRecord:
    return SpeedRecord(
        kind="throughput",
        stage=stage,
        engine="wmdd",
        dataset="synthetic",
        network="resnet18",
        resolution=224,
        unit=unit,
        metrics={"rate": rate},
        setup={"precision": "fp32", "compile": False, **setup},
        provenance={"device": "a GPU"},
    )


@pytest.fixture
def measured() -> list[SpeedRecord]:
    return [
        speed("statistics", 1000.0, "img/s"),
        speed("barycenters", 2.0, "classes/s", ipc=10, weights="uniform", starts=4),
        speed("synthesis", 10_000.0, "img·iter/s", batch=100),
        speed("students", 2.0, "students/h", batch=100, updates=15_000),
    ]


def test_the_arithmetic(config: Config, measured: list[SpeedRecord]) -> None:
    parts, _ = projection.run(config, 8, measured, SOURCE)
    hours = {part.title: (part.gpu_hours, part.wall_hours) for part in parts}
    # 100 groups of 10 classes on 8 GPUs: 13 on the fullest.
    assert hours["decode + statistics"] == pytest.approx((1_281_167 / 3.6e6, 0.13 * 1_281_167 / 3.6e6))
    assert hours["barycenters"] == pytest.approx((1000 / 7200, 130 / 7200))
    assert hours["synthesis"] == pytest.approx((10_000 * 1000 / 3.6e7, 1300 * 1000 / 3.6e7))
    # 3 students and their 3 pairs, of 300 × 100 updates: twice as many as the one measured, hence an hour each.
    assert hours["6 students (resnet18)"] == pytest.approx((6.0, 1.0))


def test_one_gpu_takes_all_its_hours(config: Config, measured: list[SpeedRecord]) -> None:
    parts, _ = projection.run(config, 1, measured, SOURCE)
    assert [part.wall_hours for part in parts] == pytest.approx([part.gpu_hours for part in parts])


def test_the_latest_fitting_record_counts(config: Config, measured: list[SpeedRecord]) -> None:
    later = measured[2].model_copy(update={"time": datetime.now(UTC) + timedelta(hours=1), "metrics": {"rate": 5e3}})
    others = [
        later.model_copy(update={"engine": "reference", "time": later.time + timedelta(hours=1)}),
        later.model_copy(update={"resolution": 64, "time": later.time + timedelta(hours=2)}),
        later.model_copy(update={"kind": "scaling", "time": later.time + timedelta(hours=3)}),
        later.model_copy(update={"setup": {**later.setup, "batch": 10}, "time": later.time + timedelta(hours=4)}),
    ]
    parts, _ = projection.run(config, 1, [later, *measured, *others], SOURCE)
    assert next(part for part in parts if part.title == "synthesis").record.metrics["rate"] == 5e3


@pytest.mark.parametrize(
    ("stage", "change", "wish"),
    [
        ("synthesis", None, "no record of synthesis"),
        ("statistics", {"network": "resnet50"}, "network resnet18"),
        ("students", {"resolution": 64}, "224 px"),
        ("barycenters", {"setup": {"ipc": 50, "weights": "uniform", "starts": 4}}, "ipc 10"),
        ("synthesis", {"setup": {"precision": "bf16", "compile": False}}, "precision fp32"),
        ("synthesis", {"setup": {"precision": "fp32", "compile": False, "batch": 10}}, "batch 100"),
    ],
)
def test_a_component_without_a_fitting_record_is_refused(
    config: Config, measured: list[SpeedRecord], stage: str, change: dict[str, Any] | None, wish: str
) -> None:
    kept = [
        one.model_copy(update=change or {}) if one.stage == stage else one
        for one in measured
        if change or one.stage != stage
    ]
    with pytest.raises(InputError) as told:
        projection.run(config, 64, kept, SOURCE)
    assert wish in str(told.value)
    assert f"wmdd bench throughput CONFIG --stage {stage} --out speeds.jsonl" in str(told.value)


def test_what_a_method_does_not_need_is_not_planned(config: Config, measured: list[SpeedRecord]) -> None:
    parts, _ = projection.run(config.model_copy(update={"method": "random"}), 1, measured[3:], SOURCE)
    assert [part.title for part in parts] == ["6 students (resnet18)"]


def test_a_run_is_planned_where_its_images_are_not(config: Config) -> None:
    assert projection.size_of(config) == (1000, 1_281_167)
    some = load_config("imagenet-1k", ["data.classes=100", "data.holdout_per_class=10"])
    assert projection.size_of(some) == (100, 128_117 - 1000)
    assert (
        projection.size_of(load_config("digits", ["data.classes=['3','5']"]))[0] == 2
    )  # listed, as names say no number
    assert projection.size_of(load_config("digits")) == projection.PUBLISHED["digits"]


def test_it_calls_itself_a_projection_and_lists_its_assumptions(config: Config, measured: list[SpeedRecord]) -> None:
    told = Console(record=True, width=120)
    projection.tell(config, 64, *projection.run(config, 64, measured, SOURCE), told)
    text = told.export_text()
    assert "PROJECTION, not a measurement" in text
    assert all(
        word in text for word in ("a GPU", "not counted: training the teacher", "generated images decode as fast")
    )


def test_times_are_rounded_up_and_readable() -> None:
    assert [projection.clock(hours) for hours in (3.14 / 3600, 0.1, 1.999)] == ["3.1 s", "6 min 00 s", "2 h 00 min"]


def test_the_command_reads_a_file_and_refuses_a_damaged_one(measured: list[SpeedRecord], tmp_path: Path) -> None:
    file = tmp_path / "speeds.jsonl"
    write_records(file, measured)
    asked = ["bench", "plan", "imagenet-1k", *(f"--set={key}" for key in KEYS), "--gpus", "8", "--from", str(file)]
    assert "GPU-hours" in CliRunner().invoke(app, asked, catch_exceptions=False).stdout
    file.write_text("{}\n")
    with pytest.raises(InputError, match=f"{file}:1: "):
        projection.read(file)


def test_speeds_of_two_devices_are_never_added_up(config: Config, measured: list[SpeedRecord]) -> None:
    mixed = [*measured[:3], measured[3].model_copy(update={"provenance": {"device": "cpu", "cpu": "Xeon"}})]

    with pytest.raises(InputError, match=r"mixes devices \(synthesis on a GPU, students on Xeon\)"):
        projection.run(config, 8, mixed, SOURCE)


def test_a_projection_carries_the_range_of_the_repeats_and_names_cpus(
    config: Config, measured: list[SpeedRecord]
) -> None:
    spread = {"rate": 2.0, "rate_low": 1.0, "rate_high": 4.0}
    slow = measured[3].model_copy(update={"metrics": spread, "provenance": {"device": "cpu", "cpu": "Xeon"}})
    told = Console(record=True, width=140)

    own = config.model_copy(update={"method": "random"})
    projection.tell(own, 1, *projection.run(own, 1, [slow], SOURCE), told)

    text = told.export_text()
    assert "6 [3, 12]" in text and "6 h 00 min [3 h 00 min, 12 h 00 min]" in text
    assert "on 1 CPU processes" in text and "Process-hours" in text and "GPU-hours" not in text
