"""What a task does by itself.  Needs no cluster."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from forked import Forked

from slurm import task as task_module
from slurm.attempts import Attempt, History, histories
from slurm.task import SlurmTask, versions
from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.errors import EXIT_BAD_INPUT, Interrupted
from wmdd.runtime.device_check import DeviceFault, check_device
from wmdd.runtime.placement import choose_device


def task(config: Config, folder: Path, **changes: object) -> SlurmTask:
    settings = {"versions": versions()} | changes
    return SlurmTask(config.model_dump(mode="json"), str(folder), "distill", (0,), {}, **settings)  # type: ignore[arg-type]


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Pretend to be local rank 1 of the second of two tasks of a job on one node."""
    places = {
        "SLURM_JOB_ID": "9",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_ID": "0",
    }
    for key, value in (places | {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path)}).items():
        monkeypatch.setenv(key, value)
    for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "inherited from the shell that submitted")
    return monkeypatch


@pytest.mark.parametrize(
    "visible, device",
    [({"CUDA_VISIBLE_DEVICES": "2,3"}, "cuda:1"), ({"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"), ({}, "cuda:1")],
)
def test_each_rank_takes_its_own_gpu_of_those_that_slurm_made_visible(
    inside: pytest.MonkeyPatch, visible: dict[str, str], device: str
) -> None:
    inside.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for key, value in visible.items():
        inside.setenv(key, value)
    name, here = task_module._join_ranks()
    assert (name, here.rank, here.size) == ("9", 1, 2)
    assert {key: os.environ[key] for key in visible} == visible
    assert (here.local, "RANK" in os.environ) == (1, False), "a rank of the shell that submitted"
    seen = len(visible.get("CUDA_VISIBLE_DEVICES", "0,1").split(","))
    assert choose_device("auto", here, seen) == device


def test_a_leftover_of_a_killed_start_does_not_fail_the_next(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leftover = tmp_path / "9_1_result.pkl.save_tmp"
    leftover.touch()
    task_module._join_ranks()
    assert not leftover.exists()


def test_a_task_whose_blocks_are_whole_never_imports_torch(digits: Config, tmp_path: Path) -> None:
    whole = task(digits, tmp_path / "run")
    assert not whole.is_whole()
    pipeline.run(digits, tmp_path / "run", share=pipeline.Share(("teacher", "distill")))
    program = f"import sys; from slurm.task import SlurmTask; print(({whole!r}).is_whole(), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "False"]
    (tmp_path / "run" / "baselines" / "random" / "blocks" / "block-00000.json").unlink()
    assert not whole.is_whole()


def test_of_several_ranks_one_decides_whether_a_block_is_whole(digits: Config, tmp_path: Path) -> None:
    """On a network file system one node may see a block that another does not see yet."""
    pipeline.run(digits, tmp_path / "0", share=pipeline.Share(("teacher", "distill")))
    (tmp_path / "1").mkdir()
    common = {"SLURM_JOB_ID": "9", "SLURM_STEP_NUM_TASKS": "2", "SUBMITIT_EXECUTOR": "slurm"}
    common |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}
    common |= {"SUBMITIT_FOLDER": str(tmp_path), "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1"}
    ranks = []
    try:
        for rank in ("0", "1"):
            # Each rank is in a folder of its own, and the run's is given relative to it.
            program = f"from slurm.task import SlurmTask; ({task(digits, Path('.'))!r})()"
            own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            ranks.append(Forked("-c", program, cwd=tmp_path / rank, env={**common, **own}))
        said = [rank.communicate(240) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
    finally:
        for rank in ranks:
            rank.end()
    assert not list((tmp_path / "1").rglob("*.safetensors"))


@pytest.mark.parametrize("gpu, device", [(True, "auto"), (False, "auto"), (True, "cpu")])
def test_a_task_that_was_given_a_gpu_never_works_on_the_cpu(
    digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, device: str
) -> None:
    """This machine has no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = digits.model_copy(update={"compute": digits.compute.model_copy(update={"device": device})})
    asked = task(config, tmp_path / "run", gpu=gpu)
    shares: list[pipeline.Share | None] = []
    monkeypatch.setattr(pipeline, "run", lambda config, folder, share: shares.append(share))
    with pytest.raises(DeviceFault, match="torch sees no GPU") if gpu and device == "auto" else nullcontext():
        asked._work()
    assert shares == ([] if gpu and device == "auto" else [pipeline.Share(("distill",), (0,), None, None)])


def test_variables_of_the_profile_may_name_those_of_the_task(
    digits: Config, tmp_path: Path, inside: pytest.MonkeyPatch
) -> None:
    inside.setenv("SLURM_PROCID", "0")
    inside.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    inside.setattr(SlurmTask, "_work", lambda self: None)
    replace(task(digits, tmp_path / "run"), environment={"TORCHINDUCTOR_CACHE_DIR": "/local/$SLURM_JOB_ID/$NONE"})()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/local/9/$NONE"
    assert histories(tmp_path / "run", ["9"])["9_0"].last == "done"


def test_each_start_of_a_job_meets_at_another_port(inside: pytest.MonkeyPatch) -> None:
    """Another program may hold the port of the start before."""
    meetings = set()
    for start in range(3):
        inside.setenv("SLURM_RESTART_COUNT", str(start))
        meetings.add(task_module._join_ranks()[1].meeting)
    assert len(meetings) == 3


def test_another_interpreter_or_version_is_wrong_input(
    digits: Config, tmp_path: Path, inside: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inside.setenv("SLURM_PROCID", "0")
    with pytest.raises(SystemExit) as left:
        task(digits, tmp_path / "run", versions=("3.9", "0.0"))()
    assert left.value.code == EXIT_BAD_INPUT
    assert "wmdd: submitted by Python and wmdd 3.9 0.0, started by 3." in capfd.readouterr().err
    assert histories(tmp_path / "run", ["9"])["9_0"].last == "refused"


def test_three_stops_at_the_same_point_end_a_task_and_a_hundred_with_progress_do_not(
    digits: Config, tmp_path: Path, inside: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inside.setenv("SLURM_PROCID", "0")
    point = ""

    def stopped(self: SlurmTask) -> None:
        raise Interrupted(point)

    inside.setattr(SlurmTask, "_work", stopped)
    for start in range(104):
        inside.setenv("SLURM_RESTART_COUNT", str(start))
        point = f"checkpointed at iteration {min(start, 101)}"
        with pytest.raises(SystemExit) as left:
            task(digits, tmp_path / "run")()
        assert left.value.code == (1 if start == 103 else 75), start
    assert "was stopped 3 times at the same point" in capfd.readouterr().err
    assert histories(tmp_path / "run", ["9"])["9_0"].last == "stuck"


def test_the_names_of_attempts_are_their_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "10.0.0.7")
    first = Attempt.of(tmp_path, "4711_103")
    first.begin()
    first.end("stopped-1234abcd")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = Attempt.of(tmp_path, "4711_103")
    second.begin()
    assert histories(tmp_path, ["4711"]) == {"4711_103": History(starts=2, last=None, restarts=1)}
    second.begun -= 70
    second.end("failed")
    assert histories(tmp_path, ["4711"])["4711_103"] == History(2, "failed", "10.0.0.7", 70, 1)
    monkeypatch.setenv("SLURMD_NODENAME", "10.0.0.8")
    Attempt.of(tmp_path, "4711_103").blame_node()  # another rank, which took rank 0 with it
    assert histories(tmp_path, ["4711"])["4711_103"] == History(2, "device", "10.0.0.8", 70, 1, ("10.0.0.8",))


def test_a_device_that_computes_wrong_values_or_is_missing_fails_its_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    check_device("cpu", {})
    with pytest.raises(DeviceFault, match=r"device check failed on node7: .*torch sees no GPU"):
        check_device("cuda", {"SLURMD_NODENAME": "node7"})
    product = torch.Tensor.__matmul__

    def off_by_one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = product(left, right)
        if found.dim() == 2:
            found[17, 3] += 1
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    with pytest.raises(DeviceFault, match="on node7: 1 rows of a product are wrong on cpu"):
        check_device("cpu", {"SLURMD_NODENAME": "node7"})
