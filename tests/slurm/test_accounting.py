"""A cluster with slurmdbd: what accounting adds, and the limits that it enforces."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import scheduler
from slurm.local_cluster import LocalCluster
from slurm.status import status
from wmdd.config.schema import Config
from wmdd.errors import InputError

from .conftest import ask, finish, log, profile, require, rows, submit, wait


@pytest.fixture(scope="module")
def accounting() -> Iterator[LocalCluster]:
    require(accounting=True)
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="wmdd-test-", dir="/tmp")) / "a", accounting=True)
    cluster.start()
    yield cluster
    cluster.stop()
    cluster.root.parent.rmdir()


@pytest.fixture(autouse=True)
def _use(accounting: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in accounting.environment.items():
        monkeypatch.setenv(key, value)


def test_accounting_knows_what_the_controller_has_forgotten(
    digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    using = profile(retries=0)
    job = submit(digits, run, ("teacher", "distill"), blocks=2, using=using)["distill"].job
    wait(lambda: "images ..." in log(run, f"{job}_1_"), 200, "block 1 is at work")
    ask("scancel", "--signal=KILL", f"{job}_1.0")
    finish(run, 200)
    monkeypatch.setattr(scheduler, "queue", lambda jobs: {})
    wait(lambda: rows(run)[1].seconds > 0, 30, "accounting has the end of the killed task")
    found = status(run)
    assert found.accounting and found.hours > 0
    assert [row.state for row in rows(run)] == ["done", "killed"]
    assert all(row.node and row.seconds for row in rows(run)), "a killed task's time counts, too"


def test_a_queue_that_refuses_more_jobs_is_one_line(digits: Config, tmp_path: Path) -> None:
    wait(lambda: not ask("squeue", "-h"), 60, "the tasks of the test before have ended")
    user = ask("id", "-un")
    ask("sacctmgr", "-i", "modify", "user", user, "set", "maxsubmitjobs=3")
    try:
        with pytest.raises(
            InputError, match="the queue takes no more jobs of yours; use fewer --blocks, or wait"
        ) as raised:
            submit(digits, tmp_path / "run", blocks=2)
        assert "\n" not in str(raised.value)
        assert ask("squeue", "-h") == "", "a part of the graph was left in the queue"
    finally:
        ask("sacctmgr", "-i", "modify", "user", user, "set", "maxsubmitjobs=-1")
