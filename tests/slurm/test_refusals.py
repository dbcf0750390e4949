"""What SLURM refuses is said in one line, and nothing is left behind."""

from pathlib import Path

import pytest

from slurm.local_cluster import LocalCluster
from slurm.profile import STAGES, Profile
from slurm.status import status
from slurm.submit import prepare
from slurm.submit import submit as hand_in
from wmdd.config import Config
from wmdd.errors import InputError

from .conftest import ask, finish, log, profile, submit


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"partition": "gpuu"}, "invalid partition specified: gpuu; sinfo lists the partitions"),
        ({"memory_gb": 9000}, "no node has that much; ask for fewer CPUs, GPUs or less memory"),
        ({"gpus_per_rank": 9}, "no node has that much; ask for fewer CPUs, GPUs or less memory"),
        ({"constraint": "a100"}, "sinfo -o %f lists the features; set constraint in the profile"),
        ({"sbatch": {"begin": "someday"}}, "sbatch: "),
    ],
)
def test_what_the_cluster_does_not_have_is_one_line(
    cluster: LocalCluster, digits: Config, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    using = profile()
    # The last stage is refused, after others have been accepted.
    stages = using.stages | {"report": using.stages["report"].model_copy(update=changes)}
    with pytest.raises(InputError) as raised:
        submit(digits, tmp_path / "run", using=Profile(name="wrong", stages=stages))
    said = str(raised.value)
    assert complaint in said and "\n" not in said and said.startswith("report: ")
    assert ask("squeue", "-h") == "", "jobs without a report were left in the queue"
    assert not list((tmp_path / "run").glob("slurm/submission-*"))


def test_a_queue_that_takes_no_more_is_one_line(cluster: LocalCluster, digits: Config, tmp_path: Path) -> None:
    ask("scontrol", "update", "partitionname=main", "state=drain")
    try:
        with pytest.raises(InputError, match="the partition takes no jobs now"):
            submit(digits, tmp_path / "run")
    finally:
        ask("scontrol", "update", "partitionname=main", "state=up")
    assert ask("squeue", "-h") == ""


def test_missing_programs_are_named(
    cluster: LocalCluster, digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = prepare(digits, tmp_path / "run", profile())
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(InputError, match="sbatch: not found on the PATH; run this on a login node"):
            hand_in(request)


def test_what_is_in_the_queue_is_not_submitted_twice(cluster: LocalCluster, digits: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ask("scontrol", "update", "partitionname=main", "state=down")  # jobs may come, and wait
    try:
        first = submit(digits, run, blocks=2)
        assert {"distill", "students", "report"} <= first.keys()
        assert prepare(digits, run, profile()).arrays == []
        with pytest.raises(InputError, match="tasks with another config are in the queue"):
            prepare(digits, run, profile(), blocks=1)
        ask("scancel", *[one.job for one in first.values()])
    finally:
        ask("scontrol", "update", "partitionname=main", "state=up")
    assert [array.stage for array in prepare(digits, run, profile(), blocks=1).arrays][-3:] == list(STAGES[1:])


def test_a_task_that_fails_ends_the_graph_and_says_why(cluster: LocalCluster, digits: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrong = digits.model_copy(update={"compute": digits.compute.model_copy(update={"device": "cuda:7"})})
    launched = submit(wrong, run, blocks=1)
    finish(run, 200)
    first = status(run).rows[0]
    assert (first.state, first.why) == ("failed", "its log says why")
    assert "torch sees no GPU" in log(run, next(iter(launched.values())).job)
    assert {(row.state, row.why) for row in status(run).rows[1:]} == {("cancelled", "what it waited for failed")}
    assert ask("squeue", "-h") == "", "a job waits for ever"
