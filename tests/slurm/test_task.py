"""What a task does by itself.  Needs no cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import scheduler
from slurm import task as task_module
from slurm.submissions import Attempts, marks
from slurm.task import Attempt, SlurmTask, versions
from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.errors import Interrupted, WmddError
from wmdd.runtime.placement import choose_device


def task(config: Config, folder: Path, **changes: object) -> SlurmTask:
    settings = {"max_restarts": 3, "requeue": True, "versions": versions()} | changes
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
    }
    for key, value in (places | {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path)}).items():
        monkeypatch.setenv(key, value)
    for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "inherited from the shell that submitted")
    monkeypatch.delenv("MASTER_PORT")
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
    assert [os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]
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
    common = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SUBMITIT_EXECUTOR": "slurm"}
    common |= {"SUBMITIT_FOLDER": str(tmp_path), "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1"}
    ranks = []
    try:
        for rank in ("0", "1"):
            # Each rank is in a folder of its own, and the run's is given relative to it.
            program = f"from slurm.task import SlurmTask; ({task(digits, Path('.'))!r})()"
            own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            command = [sys.executable, "-c", program]
            ranks.append(subprocess.Popen(command, cwd=tmp_path / rank, env={**os.environ, **common, **own}))
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert not list((tmp_path / "1").rglob("*.safetensors"))


@pytest.mark.parametrize("gpu, device, wanted", [(True, "auto", "cuda"), (False, "auto", None), (True, "cpu", None)])
def test_a_task_that_was_given_a_gpu_never_works_on_the_cpu(
    digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, device: str, wanted: str | None
) -> None:
    config = digits.model_copy(update={"compute": digits.compute.model_copy(update={"device": device})})
    asked = task(config, tmp_path, gpu=gpu)
    shares: list[pipeline.Share | None] = []
    monkeypatch.setattr(pipeline, "run", lambda config, folder, share: shares.append(share))
    asked._work()
    assert shares == [pipeline.Share(("distill",), (0,), None, wanted)]


def test_another_interpreter_or_version_is_refused(digits: Config, tmp_path: Path) -> None:
    with pytest.raises(WmddError, match=r"submitted by Python and wmdd 3\.9 0\.0, started by 3\."):
        task(digits, tmp_path, versions=("3.9", "0.0"))()


def test_who_comes_back_and_how_often(digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Interrupted("checkpointed")
    answers = {"squeue": "RUNNING\n", "scontrol": ""}
    monkeypatch.setattr(scheduler, "call", lambda program, *rest: answers[program])
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert task(digits, tmp_path)._come_back(stopped) == "requeued"
    answers["squeue"] = "COMPLETING\n"  # SLURM is cancelling or requeueing it
    assert task(digits, tmp_path)._come_back(stopped) == "stopped"
    with pytest.raises(WmddError, match="came back 2 times"):
        task(digits, tmp_path, max_restarts=2)._come_back(stopped)
    with pytest.raises(WmddError, match="requeue = false"):
        task(digits, tmp_path, requeue=False)._come_back(stopped)


def test_the_names_of_attempts_are_their_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Attempt.begin(tmp_path, "4711_3").end("requeued")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = Attempt.begin(tmp_path, "4711_3")
    assert marks(tmp_path)["4711_3"] == Attempts(starts=2, last=None, seconds=0, restarts=1)
    second.begun -= 70
    second.end("done")
    assert marks(tmp_path) == {"4711_3": Attempts(starts=2, last="done", seconds=70, restarts=1)}
