"""What SLURM refuses is said in one line, and nothing is left behind."""

import multiprocessing
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slurm import submissions
from slurm import submit as submission
from slurm.cli import app
from slurm.local_cluster import LocalCluster
from slurm.profile import STAGES, Profile
from slurm.status import mending, status
from slurm.submit import prepare
from slurm.submit import submit as hand_in
from wmdd.config.schema import Config
from wmdd.errors import InputError

from .conftest import ask, finish, log, node_down, profile, submit, wait

fork = multiprocessing.get_context("fork")


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


def test_nodes_that_are_away_today_refuse_nothing(
    cluster: LocalCluster, digits: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SLURM counts a drained node as one that does not exist."""
    stages = dict.fromkeys(STAGES, profile(nodes=cluster.nodes).stages["distill"])
    with node_down(cluster.node_names[-1], "drain"):
        launched = submit(digits, tmp_path / "run", ("distill",), 1, Profile(name="all", stages=stages))
        assert ask("squeue", "-h", "-o", "%i %T") == f"{launched['distill'].job} PENDING"
        assert "nodes are down or drained; submitted anyway" in caplog.text
        ask("scancel", launched["distill"].job)


def test_a_task_that_slurm_holds_is_named_with_the_command_that_releases_it(
    cluster: LocalCluster, digits: Config, tmp_path: Path
) -> None:
    job = submit(digits, tmp_path / "run", ("distill",), 1)["distill"].job
    ask("scontrol", "hold", job)
    assert mending(tmp_path / "run", status(tmp_path / "run"))[-1] == f"scontrol release {job}"
    ask("scancel", job)


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
        assert prepare(digits, run, profile(cpus_per_rank=4)).arrays == [], "another profile is another config"
        assert CliRunner().invoke(app, ["throttle", str(run), "1"]).output.endswith(": 1 tasks at a time\n")
        assert "ArrayTaskThrottle=1" in ask("scontrol", "show", "job", first["distill"].job)
        ask("scancel", *[one.job for one in first.values()])
    finally:
        ask("scontrol", "update", "partitionname=main", "state=up")
    assert [array.stage for array in prepare(digits, run, profile(), blocks=1).arrays][-3:] == list(STAGES[1:])


def test_two_commands_that_submit_one_run_at_once_submit_each_task_once(
    cluster: LocalCluster, digits: Config, tmp_path: Path
) -> None:
    run, together, found = tmp_path / "run", fork.Barrier(2), fork.SimpleQueue()

    def work() -> None:
        try:
            request = prepare(digits, run, profile(), 2)
            together.wait(120)
            found.put([(one.stage, one.job) for one in hand_in(request)])
        except BaseException as error:
            found.put(repr(error))

    ask("scontrol", "update", "partitionname=main", "state=down")  # jobs may come, and wait
    processes = [fork.Process(target=work) for _ in range(2)]
    try:
        for process in processes:
            process.start()
        submitted = sorted((found.get() for _ in processes), key=len)
        assert submitted[0] == [], submitted
        written = submissions.read(run)
        assert [(one.stage, one.job) for one in written] == submitted[1]
        assert {name for one in written for name in one.names()} == set(ask("squeue", "-hr", "-o", "%i").split())
    finally:
        for process in processes:
            process.kill()
        ask("scontrol", "update", "partitionname=main", "state=up")


def test_a_submission_never_replaces_the_file_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "_files", lambda run: [])  # as two commands see it that begin at once
    written = {submissions.write(tmp_path, "test", []).name for _ in range(3)}
    assert written == {"submission-0001.json", "submission-0002.json", "submission-0003.json"}


def test_the_folder_of_pickles_is_private_and_refused_if_others_can_write_there(
    cluster: LocalCluster, digits: Config, tmp_path: Path
) -> None:
    before = os.umask(0o002)  # as in a folder of a project
    try:
        ask("scontrol", "update", "partitionname=main", "state=down")
        launched = submit(digits, tmp_path / "run", blocks=2)
        jobs = tmp_path / "run" / "slurm" / "jobs"
        assert jobs.stat().st_mode & 0o7777 == 0o700 and list(jobs.rglob("*.pkl"))
        ask("scancel", *[one.job for one in launched.values()])
        wait(lambda: not ask("squeue", "-h"), 30, "the queue is empty")
        jobs.chmod(0o770)
        with pytest.raises(InputError, match="slurm/jobs: others can write there, and jobs run what lies there"):
            submit(digits, tmp_path / "run", blocks=2)
        assert ask("squeue", "-h") == ""
    finally:
        os.umask(before)
        ask("scontrol", "update", "partitionname=main", "state=up")


def test_wrong_input_is_not_tried_again_and_status_says_what_is_wrong(
    cluster: LocalCluster, digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(submission, "versions", lambda: ("3.9", "0.0"))  # as another installation submits it
    submit(digits, run, blocks=2)
    finish(run, 200)
    found = status(run)
    first = found.rows[0]
    assert (first.state, first.restarts) == ("wrong input", 0)
    assert first.why.startswith("submitted by Python and wmdd 3.9 0.0, started by 3.")
    # Where the cache has the teacher, no task waits for it, and both blocks begin.
    assert {row.why for row in found.rows[:-1]} <= {first.why, "what it waited for failed"}
    assert [(row.stage, row.state) for row in found.rows[:-1] if row.stage == "students"] == [("students", "cancelled")]
    assert sum(row.restarts for row in found.rows) == 0
    assert "wrong input: mend what the message says" in mending(run, found)
    assert ask("squeue", "-h") == "", "a job waits for ever"


def test_where_every_node_seems_bad_the_task_gives_up_and_nothing_waits_for_ever(
    cluster: LocalCluster, digits: Config, tmp_path: Path
) -> None:
    """The cluster's GPUs are stand-ins: SLURM grants them, and torch sees none on any node."""
    run = tmp_path / "run"
    job = submit(digits, run, ("distill",), blocks=1, using=profile(gpus_per_rank=1, retries=1))["distill"].job
    finish(run, 300)
    found = status(run)
    assert {(row.state, row.restarts) for row in found.rows} == {("bad node", 1)}
    assert "torch sees no GPU" in found.rows[0].why
    lines = mending(run, found)
    assert any(line.startswith("bad node: set exclude in the profile") and "127.0.0." in line for line in lines)
    assert ask("squeue", "-h") == "", "a job waits for ever"
    assert log(run, job).count("excluded from the rest of this array: 127.0.0.") == 1
    assert not list(run.rglob("*.safetensors"))
