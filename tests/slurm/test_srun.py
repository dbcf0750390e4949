"""``srun -n N python -m wmdd run``: the tasks of the step are the ranks of one run."""

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import TINY, blocks_of

from slurm.local_cluster import LocalCluster
from wmdd import pipeline

SETTINGS = [*TINY, "synthesis.classes_per_group=1", "student.baselines=[]", "student.seeds=1"]


def srun(*command: str, tasks: int, nodes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a command in a step of its own."""
    options = [f"--ntasks={tasks}", f"--nodes={nodes}", "--mem-per-cpu=500", "--time=10", "--kill-on-bad-exit=1"]
    step = ["srun", *options, *command]
    return subprocess.run(step, capture_output=True, text=True, timeout=400)


def run(out: str, *settings: str) -> list[str]:
    words = [word for value in [*SETTINGS, *settings] for word in ("--set", value)]
    return [sys.executable, "-m", "wmdd", "run", "digits", "--out", out, *words]


def test_the_tasks_of_one_srun_do_one_run_together(cluster: LocalCluster, tmp_path: Path) -> None:
    pipeline.run("digits", tmp_path / "one", SETTINGS)
    done = srun(*run(str(tmp_path / "three")), tasks=3, nodes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("one run on the 3 tasks that srun started") == 1
    assert done.stderr.count("report: ") == 1, "several copies ran"
    assert blocks_of(tmp_path / "three") == blocks_of(tmp_path / "one")


def test_tasks_of_one_srun_with_runs_of_their_own_are_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    script = shlex.join(run("OUT")).replace("OUT", f"{tmp_path}/$SLURM_PROCID")
    done = srun("sh", "-c", script, tasks=2)
    assert done.returncode != 0
    assert "wmdd: rank 1 of 2: started with another config, --out or share than rank 0" in done.stderr
    assert "srun --exact -n 1" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_single_task_and_a_shell_on_a_terminal_stand_alone(cluster: LocalCluster) -> None:
    program = "import os; from wmdd.runtime.placement import placement_of; print(placement_of(os.environ).size)"
    command = [sys.executable, "-c", program]
    assert srun(*command, tasks=1).stdout.split() == ["1"]
    assert srun(*command, tasks=3).stdout.split() == ["3"] * 3
    ours, theirs = pty.openpty()
    try:
        step = ["srun", "--ntasks=3", "--mem-per-cpu=500", "--pty", *command]
        subprocess.run(step, stdin=theirs, stdout=theirs, stderr=theirs, timeout=60)
        assert os.read(ours, 1000).split() == [b"1"]
    finally:
        os.close(ours)
        os.close(theirs)
