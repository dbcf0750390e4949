"""A protocol on a real cluster: submitted cell by cell, reported by the same command once it is done."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from typer.testing import CliRunner

from slurm.launcher import nodes_of, study_script
from slurm.local_cluster import LocalCluster
from slurm.profile import load_profile
from slurm.status import status
from wmdd.cli import app
from wmdd.errors import InputError, WmddError
from wmdd.launchers import Step, find
from wmdd.records.files import read_records
from wmdd.records.schema import SpeedRecord

from .conftest import ask, wait

PROTOCOL = f"""
name = "tiny"
config = "digits"
overrides = {[*TINY, "student.seeds=1"]}
methods = ["random", "herding"]
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
    runs = [tmp_path / "out" / "ipc-001" / name / "seed-000" for name in ("random", "herding")]
    wait(lambda: not any(status(run).active for run in runs), 300, "the graphs end")
    assert not ask("squeue", "-h")

    second = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "Accuracy" in second.output and "herding" in second.output
    assert not ask("squeue", "-h"), "what is done was submitted again"
    assert (tmp_path / "out" / "report.html").exists()


def test_a_scaling_study_is_one_job_on_the_same_nodes_and_resumes_where_it_was(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    (tmp_path / "narrow.toml").write_text(PROFILE)
    out, folder = tmp_path / "scaling.jsonl", tmp_path / "study"
    command = ["bench", "scaling", "digits", "--repeats", "1", "--ranks", "1,2", "--out", str(out)]
    command += [f"--set={one}" for one in (*TINY, "synthesis.classes_per_group=1")]
    command += ["--slurm", str(tmp_path / "narrow.toml"), "--folder", str(folder)]
    caller = subprocess.Popen([sys.executable, "-m", "wmdd", *command])
    try:
        wait(lambda: (folder / "strong-2-0" / "rank-00001.json").exists(), 200, "the largest size is done")
        [first] = ask("squeue", "-h", "-o", "%i %D").splitlines()
        assert first.split()[1] == "2", "not the nodes of the largest size"
    finally:
        caller.kill()
        caller.wait()
    ask("scancel", first.split()[0])
    wait(lambda: not ask("squeue", "-h"), 60, "the job has ended")
    (folder / "strong-1-0" / "rank-00000.json").unlink(missing_ok=True)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("strong-2-0/rank-*.json")}
    assert len(kept) == 2

    CliRunner().invoke(app, command, catch_exceptions=False)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "a finished size ran again"
    found = read_records(out, SpeedRecord)[0]
    assert [record.ranks for record in found] == [1, 2]
    assert all(record.metrics["same_images"] == 1 and record.metrics["startup"] > 0.5 for record in found)
    nodes = [record.provenance["nodes"] for record in found]
    assert nodes == ["127.0.0.11", "127.0.0.[11-12]"], "not the same nodes for all"


def test_a_study_of_64_ranks_on_nodes_of_8_gpus_asks_for_8_nodes(tmp_path: Path) -> None:
    (tmp_path / "wide.toml").write_text("gpu_type = 'a100'\nnode_ranks = 8\ncpus_per_rank = 4\nmemory_gb = 10\n")
    steps = [Step(ranks, "module", (), tmp_path / str(ranks)) for ranks in (64, 8, 1)]
    script = study_script(load_profile(str(tmp_path / "wide.toml")), steps, tmp_path)
    for line in ("--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=a100:8", "--mem=81920M"):
        assert f"#SBATCH {line}\n" in script, line
    assert "export WMDD_JOB_SECRET=$(od " in script, "the ranks of a step share no secret"
    lines = [line for line in script.splitlines() if "|| srun" in line]
    layouts = ["--nodes=8 --ntasks=64", "--nodes=1 --ntasks=8", "--nodes=1 --ntasks=1 "]
    assert all(wanted in line for line, wanted in zip(lines, layouts, strict=True))
    with pytest.raises(InputError, match="12 ranks do not fill nodes of 8"):
        nodes_of(load_profile(str(tmp_path / "wide.toml")), 12)


def test_a_step_that_fails_says_why(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "narrow.toml").write_text(PROFILE)
    (tmp_path / "step").mkdir()
    step = Step(1, "nowhere", (), tmp_path / "step")
    with pytest.raises(WmddError, match=r"1 of 1 steps are not done: .*nowhere"):
        find("slurm", str(tmp_path / "narrow.toml")).run_steps([step], tmp_path)


def test_an_unknown_launcher_or_profile_is_refused() -> None:
    with pytest.raises(InputError, match="no launcher 'slrum' is installed; did you mean 'slurm'"):
        find("slrum", "local")
    with pytest.raises(InputError, match="nowhere"):
        find("slurm", "nowhere")
