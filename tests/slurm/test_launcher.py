"""A protocol on a real cluster: submitted cell by cell, reported by the same command once it is done."""

from pathlib import Path

import pytest
from conftest import TINY
from typer.testing import CliRunner

from slurm.local_cluster import LocalCluster
from slurm.status import status
from wmdd.cli import app
from wmdd.errors import InputError, WmddError
from wmdd.launchers import find
from wmdd.records.files import read_records
from wmdd.records.schema import SpeedRecord

from .conftest import ask, wait

PROTOCOL = f"""
name = "tiny"
config = "digits"
overrides = {[*TINY, "student.seeds=1"]}
methods = ["random", "wmdd"]
ipc = [1]
regimes = ["hard"]
distillation_seeds = 1
"""
PROFILE = """
gpus_per_rank = 0
cpus_per_rank = 1
memory_gb = 1
minutes = 10
"""


def test_a_protocol_is_submitted_and_reported_by_the_same_command(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    (tmp_path / "narrow.toml").write_text(PROFILE)
    command = ["bench", "protocol", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out")]
    command += ["--slurm", str(tmp_path / "narrow.toml")]

    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "no student has finished yet" in first.output
    runs = [tmp_path / "out" / "ipc-001" / name / "seed-000" for name in ("random", "wmdd")]
    wait(lambda: not any(status(run).active for run in runs), 300, "the graphs end")
    assert not ask("squeue", "-h")

    second = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "Accuracy" in second.output and "wmdd" in second.output
    assert not ask("squeue", "-h"), "what is done was submitted again"
    assert (tmp_path / "out" / "report.html").exists()


def test_a_scaling_study_runs_each_size_as_a_job_of_its_own(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "narrow.toml").write_text(PROFILE)
    out = tmp_path / "scaling.jsonl"
    command = ["bench", "scaling", "digits", "--repeats", "1", "--ranks", "1,2", "--out", str(out)]
    command += [f"--set={one}" for one in (*TINY, "synthesis.classes_per_group=1")]
    CliRunner().invoke(
        app,
        [*command, "--slurm", str(tmp_path / "narrow.toml"), "--folder", str(tmp_path / "jobs")],
        catch_exceptions=False,
    )
    found = read_records(out, SpeedRecord)[0]
    assert [record.ranks for record in found] == [1, 2]
    assert all(record.metrics["same_images"] == 1 for record in found)
    nodes = {path.name.split("_")[0] for path in (tmp_path / "jobs" / "2-0" / "job").glob("*_result.pkl")}
    assert len(nodes) == 1, "both ranks belong to one job"


def test_a_job_that_fails_says_why(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "narrow.toml").write_text(PROFILE)
    with pytest.raises(WmddError, match=r"failed: .*nowhere"):
        find("slurm", str(tmp_path / "narrow.toml")).job(1, "nowhere", [], tmp_path / "jobs")


def test_an_unknown_launcher_or_profile_is_refused() -> None:
    with pytest.raises(InputError, match="no launcher 'slrum' is installed; did you mean 'slurm'"):
        find("slrum", "local")
    with pytest.raises(InputError, match="nowhere"):
        find("slurm", "nowhere")
