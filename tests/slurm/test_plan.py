"""What is planned before anything is submitted: blocks, chunks, estimates, profiles.  Needs no cluster."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from slurm.cli import app
from slurm.plan import Array, ClusterSpeed, blocks_for, chunks, estimate, missing_students
from slurm.profile import load_profile, parse_stages, profile_names
from wmdd import pipeline
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
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
    assert blocks_for(config, 1000, ClusterSpeed(), 30, ranks=1) == 100
    assert blocks_for(config, 1000, ClusterSpeed(rate=1000), 30, ranks=1) == 12  # 20,000 s of 1,800 s
    assert blocks_for(config, 1000, ClusterSpeed(rate=1000), 30, ranks=4) == 3
    assert blocks_for(config, 1000, ClusterSpeed(rate=1), 30, ranks=8) == 12, (
        "a task must not have fewer groups than ranks"
    )
    assert blocks_for(config, 1000, ClusterSpeed(rate=1e9), 30, ranks=1) == 1


def test_arrays_stay_below_the_limit_of_the_cluster() -> None:
    assert chunks(range(5), 1, 1000) == ((0,), (1,), (2,), (3,), (4,))
    assert chunks(range(5), 2, 1000) == ((0, 1), (2, 3), (4,))
    assert chunks([], 3, 1000) == ()
    dealt = chunks(range(2500), 1, 1000)
    assert len(dealt) <= 1000 and [item for task in dealt for item in task] == list(range(2500))


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
    found = estimate(config, 1000, planned, ClusterSpeed(rate=1000, student_minutes=60))
    assert found.gpu_hours["distill"] == pytest.approx(2e7 / 1000 / 3600)  # the baseline, random, optimises nothing
    assert found.gpu_hours["students"] == 12
    images = 10_000 * 3 * 224**2
    assert 4 * images < found.size < 5 * images
    assert found.inodes > 100 * (2 * 2 + 4)
    assert estimate(config, 1000, planned, ClusterSpeed()).gpu_hours == {"distill": None, "students": None}


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
