"""What is planned before anything is submitted: blocks, chunks, estimates, profiles.  Needs no cluster."""

import dataclasses
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slurm
from slurm.cli import app
from slurm.estimate import ClusterSpeed, estimate, measured, memory_gb, student_seconds
from slurm.plan import (
    Array,
    Selection,
    TaskSize,
    arrays,
    blocks_for,
    chunks,
    missing_students,
    students_a_task,
)
from slurm.profile import load_profile, parse_blocks, parse_stages, profile_names
from slurm.submit import Request, _items
from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.data.dataset import load_dataset
from wmdd.errors import InputError
from wmdd.runs.folder import RunFolder

from .conftest import NARROW


def test_every_profile_that_ships_is_valid_and_gives_each_stage_its_resources() -> None:
    assert {"a100", "cpu", "local", "preemptible"} <= set(profile_names())
    for name in profile_names():
        stages = load_profile(name).stages
        assert stages["teacher"].ranks == stages["report"].ranks == 1
    assert load_profile("a100").stages["distill"].gpus == 1
    assert load_profile("a100").stages["report"].gpus == 0
    examples = list((Path(slurm.__file__).parent / "examples").glob("*.toml"))
    assert len(examples) == 2 and all(load_profile(str(example)) for example in examples)


def test_a_table_changes_one_stage_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("nodes = 2\nranks_per_node = 4\ncpus_per_rank = 3\n[students]\nnodes = 1\ncpus_per_rank = 5\n")
    stages = load_profile(str(file)).stages
    assert [(stage.ranks, stage.cpus_per_rank) for stage in stages.values()] == [(1, 3), (8, 3), (4, 5), (1, 3)]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("partion = 'gpu'", "unknown key 'partion': did you mean 'partition'?"),
        ("[students]\npartion = 'gpu'", "unknown key 'students.partion': did you mean 'partition'?"),
        ("minutes = 'long'", "minutes: "),
        ("minutes = 2", "minutes = 2 leaves no time before the warning; use 4 or more"),
        ("rate = 0", "rate: "),
        ("teacher = 3", "teacher is a table of keys"),
        ("minutes = ", "is not TOML"),
    ],
)
def test_a_wrong_profile_gets_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError) as raised:
        load_profile(str(file))
    assert complaint in str(raised.value) and "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_profiles_and_stages_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such profile; did you mean 'a100'\?"):
        load_profile("a10")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_profile(str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match="did you mean 'students'"):
        parse_stages("teacher,student")
    assert parse_stages("report, teacher") == ("teacher", "report")


def test_blocks_follow_from_the_length_of_a_task() -> None:
    config = load_config("imagenet-1k", ["student.baselines=[]"])  # 1,000 classes in 100 groups, 2e7 image-iterations

    def blocks(ranks: int, rate: float | None = None) -> int:
        return blocks_for(config, 1000, TaskSize(30, ClusterSpeed(rate)), ranks)

    assert blocks(ranks=1) == 100
    assert blocks(ranks=1, rate=1000) == 12  # 20,000 s of 1,800 s
    assert blocks(ranks=4, rate=1000) == 3
    assert blocks(ranks=8, rate=1) == 12, "a task must not have fewer groups than ranks"
    assert blocks(ranks=1, rate=1e9) == 1


def test_students_of_another_size_take_their_own_updates_and_fill_all_ranks_of_a_task() -> None:
    """A probe of 20 classes trains its students for a fiftieth of the updates of 1,000 classes."""
    probe, full = load_config("imagenet-1k", ["data.classes=20"]), load_config("imagenet-1k")
    speed = ClusterSpeed(update_seconds=0.05, batch=100.0, validation_seconds=0.2)
    short, long = student_seconds(probe, 20, speed), student_seconds(full, 1000, speed)
    assert long - 1000 * 0.2 == pytest.approx(50 * (short - 20 * 0.2))
    assert student_seconds(full, 1000, ClusterSpeed()) == 0.0
    batch = slurm.estimate._batch(full, 1000)
    small = dataclasses.replace(speed, batch=batch / 4, validation_seconds=0.0)
    seconds = [student_seconds(full, 1000, small, None, growth) for growth in (0.0, 0.5, 1.0)]
    assert seconds == pytest.approx([seconds[0], 2 * seconds[0], 4 * seconds[0]]), "four times the images an update"
    size = TaskSize(30, speed)
    assert long > 1800 and students_a_task(full, 1000, size, ranks=8) == 8, "a GPU of the task has no student"
    in_teams = full.model_copy(update={"student": full.student.model_copy(update={"ranks": 4})})
    assert students_a_task(in_teams, 1000, size, ranks=8) == 2
    assert students_a_task(probe, 20, size, ranks=2) == 2 * int(1800 / short)


@pytest.mark.slow
def test_a_finished_run_tells_its_speeds(digits: Config, tmp_path: Path) -> None:
    speed = measured(pipeline.run(digits, tmp_path / "run"))
    assert speed.rate and speed.rates and speed.rates[0] <= speed.rate <= speed.rates[1]
    assert speed.update_seconds and speed.updates and speed.batch
    assert speed.statistics_seconds and speed.validation_seconds
    assert student_seconds(digits, 4, speed) > 0
    with pytest.raises(InputError, match="holds no run"):
        measured(tmp_path)


def test_arrays_stay_below_the_limit_of_the_cluster() -> None:
    assert chunks(range(5), 1, 1000) == ((0,), (1,), (2,), (3,), (4,))
    assert chunks(range(5), 2, 1000) == ((0, 1), (2, 3), (4,))
    assert chunks([], 3, 1000) == ()
    dealt = chunks(range(2500), 1, 1000)
    assert len(dealt) <= 1000 and [item for task in dealt for item in task] == list(range(2500))


@pytest.mark.slow
def test_students_of_another_recipe_are_missing(digits: Config, tmp_path: Path) -> None:
    averaged = digits.model_copy(update={"student": digits.student.model_copy(update={"ema": 0.9})})
    folder = RunFolder(pipeline.run(averaged, tmp_path / "run"))
    assert missing_students(averaged, folder) == []
    assert missing_students(digits, folder) == list(range(len(pipeline.students_of(digits, folder))))


def test_an_estimate_counts_hours_bytes_and_files() -> None:
    config = load_config("imagenet-1k", ["blocks=100", "student.baseline_sets=1"])
    planned = [
        Array("distill", chunks(range(100), 1, 1000), NARROW.model_copy(update={"gpus_per_rank": 1})),
        Array("students", chunks(range(12), 3, 1000), NARROW),
    ]
    speed = ClusterSpeed(rate=1000, rates=(500, 2000), update_seconds=0.06, validation_seconds=0.0)
    found = estimate(config, 1000, planned, speed)
    distill, students = found.gpu_hours["distill"], found.gpu_hours["students"]
    assert distill and students
    assert distill.best == pytest.approx(2e7 / 1000 / 3600)  # the baseline, random, optimises nothing
    assert (distill.low, distill.high) == pytest.approx((distill.best / 2, distill.best * 2))
    assert students.best == pytest.approx(12 * student_seconds(config, 1000, speed) / 3600)
    images = 10_000 * 3 * 224**2
    assert 4 * images < found.size < 5 * images
    assert found.inodes > 100 * (2 * 2 + 4)
    assert estimate(config, 1000, planned, ClusterSpeed()).gpu_hours == {"distill": None, "students": None}


def test_an_estimate_says_which_ranks_have_nothing_to_do() -> None:
    config = load_config("imagenet-1k", ["blocks=100"])  # 100 blocks of one group each
    wide = NARROW.model_copy(update={"ranks_per_node": 8})
    planned = [Array("distill", chunks(range(100), 1, 1000), wide), Array("students", chunks(range(12), 8, 1000), wide)]
    found = estimate(config, 1000, planned, ClusterSpeed())
    assert found.busy == {"distill": 1 / 8, "students": 12 / 16}
    assert found.most_ranks == {"distill": 100, "students": 12}
    halves = load_config("imagenet-1k", ["blocks=100", "synthesis.split_class=2"])
    assert estimate(halves, 1000, planned, ClusterSpeed()).busy["distill"] == 1 / 4


def test_the_wall_time_of_an_array_is_that_of_its_last_task() -> None:
    config = load_config("imagenet-1k", ["blocks=10", "student.baselines=[]"])
    planned = [Array("distill", chunks(range(10), 1, 1000), NARROW)]  # three at a time
    speed = ClusterSpeed(rate=1000, start_seconds=60, statistics_seconds=1)
    found = estimate(config, 1000, planned, speed).wall_seconds["distill"]
    assert found == pytest.approx(4 * (60 + 2e6 / 1000 + 100))


def test_memory_grows_with_the_ranks_which_share_images(digits: Config) -> None:
    dataset = load_dataset(digits.data)
    one = memory_gb(digits, dataset, "students", NARROW, False)
    eight = memory_gb(digits, dataset, "students", NARROW.model_copy(update={"ranks_per_node": 8}), False)
    assert eight < 8 * one == pytest.approx(eight, rel=1e-3) and 1 < one < 2
    assert memory_gb(digits, dataset, "teacher", NARROW, True) > memory_gb(digits, dataset, "teacher", NARROW, False)
    streamed = digits.replace({"data.memory_gb": 0})
    assert memory_gb(streamed, dataset, "teacher", NARROW, True) == memory_gb(digits, dataset, "teacher", NARROW, False)


def test_some_blocks_are_submitted_alone_and_students_with_the_last_of_them(
    digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))  # there is no teacher yet
    config, folder = digits.model_copy(update={"blocks": 2}), RunFolder(tmp_path / "run")
    dataset, profile, size = load_dataset(digits.data), load_profile("local"), TaskSize(30, ClusterSpeed())

    def planned(selection: Selection) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {one.stage: one.tasks for one in arrays(config, folder, dataset, profile, size, selection)}

    assert planned(Selection(blocks=(1,))) == {"teacher": ((),), "distill": ((1,),)}
    last = planned(Selection(blocks=(1,), queued={"teacher": {0}, "distill": {0}}))
    assert list(last) == ["distill", "students", "report"] and last["distill"] == ((1,),)
    with pytest.raises(InputError, match="--only-blocks 2: the run has blocks 0 to 1"):
        Selection(blocks=(0, 2)).check(2)
    assert parse_blocks("0-2, 7") == (0, 1, 2, 7)
    for wrong in ("", "a", "3-", "-3", "1,,2"):
        with pytest.raises(InputError, match="expected numbers and ranges"):
            parse_blocks(wrong)


@pytest.mark.slow
def test_ten_thousand_students_are_planned_in_a_moment() -> None:
    """Work that grew with the square of their number took minutes; here the calls are counted, not the seconds."""
    config = load_config("digits", ["student.seeds=10000", "student.networks=['convnet2x8']", "student.baselines=[]"])
    request = Request(config, RunFolder(Path("run")), None, None, None, None)  # type: ignore[arg-type]
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        items = _items(request, "students")
    finally:
        sys.setprofile(None)
    students = len(pipeline.students_of(config, request.folder))
    assert students >= 10_000 and list(items) == list(range(students))
    assert calls < 200 * students


def test_a_dry_run_needs_no_cluster_and_writes_nothing(
    tmp_path: Path, digits: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["submit", "digits", "--profile", "a100", "--dry-run", "--rate", "500", "--blocks", "5"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert not (tmp_path / "runs").exists()
    assert "#SBATCH --array=0-4%5" in shown and "#SBATCH --dependency='afterok:<teacher>'" in shown
    assert "#SBATCH --hold" in shown and "#SBATCH --signal=USR2@120" in shown and "#SBATCH --requeue" in shown
    assert (
        "distill   about 0." in shown
        and "GPU-hours" in shown
        and "MB in" in shown
        and "students  GPU-hours unknown" in shown
    )
    refused = CliRunner().invoke(app, command[:4])
    assert isinstance(refused.exception, InputError) and "sbatch: not found on the PATH" in str(refused.exception)
