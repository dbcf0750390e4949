"""A real cluster for the tests: booted once, of four virtual nodes; skipped, with the reason, where SLURM is absent."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY

from slurm import status as reporter
from slurm import submit as submission
from slurm.estimate import ClusterSpeed
from slurm.local_cluster import LocalCluster, missing_programs
from slurm.plan import Selection
from slurm.profile import STAGES, Profile, Resources, Stage
from slurm.status import Row
from slurm.submissions import Submitted
from wmdd.config.loading import load_config
from wmdd.config.schema import Config

NARROW = Resources(
    gpus_per_rank=0, cpus_per_rank=1, memory_gb=1, minutes=10, signal_seconds=30, parallel=3, requeue=True
)
"""What a task of the tests asks for."""


def require(accounting: bool = False) -> None:
    """Skip without the programs, or fail where the caller insists that they be there."""
    if absent := missing_programs(accounting):
        reason = f"needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge; docs/guides/slurm.md)"
        if os.environ.get("WMDD_REQUIRE_SLURM") == "1":
            pytest.fail(f"WMDD_REQUIRE_SLURM=1, and this test {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def booted() -> Iterator[LocalCluster]:
    require()
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="wmdd-test-", dir="/tmp")) / "c")
    cluster.start()
    yield cluster
    cluster.stop()
    cluster.root.parent.rmdir()


@pytest.fixture
def cluster(booted: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """Point this process at the cluster, and leave the queue empty and the nodes up."""
    for key, value in booted.environment.items():
        monkeypatch.setenv(key, value)
    yield booted
    ask("scancel", "--quiet", "--user", str(os.getuid()))
    wait(lambda: not ask("squeue", "-h"), 30, "the queue is empty")


@pytest.fixture
def digits() -> Config:
    """Return the config of a run of about a second: 4 digits in 2 groups, 2 images each, 4 students."""
    return load_config("digits", [*TINY, "student.seeds=1", "labels.regimes=['hard']"])


def ask(*command: str) -> str:
    """Return what one of SLURM's programs prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something holds; fail with its name when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{ask('squeue', '--states=all')}"
        time.sleep(0.5)  # each look starts programs of SLURM


def profile(**changes: object) -> Profile:
    """Return a profile whose stages all ask for little, with changes; students share one task."""
    resources = NARROW.model_copy(update=changes)
    return Profile(name="test", stages=dict.fromkeys(STAGES, resources), update_seconds=0.001)


def submit(
    config: Config,
    out: Path,
    stages: Sequence[Stage] = STAGES,
    blocks: int | None = None,
    using: Profile | None = None,
    speed: ClusterSpeed | None = None,
) -> dict[Stage, Submitted]:
    """Submit a run; return what was launched, by stage."""
    request = submission.prepare(config, out, using or profile(), blocks, speed=speed, selection=Selection(stages))
    return {one.stage: one for one in submission.submit(request)}


def rows(run: Path, stage: Stage = "distill") -> list[Row]:
    """Return the tasks of one stage as ``status`` sees them."""
    return [row for row in reporter.status(run).rows if row.stage == stage]


def finish(run: Path, seconds: float = 400) -> None:
    """Wait until no task of a run may still do something."""
    wait(lambda: not reporter.status(run).active, seconds, f"{run.name} ends")


def log(run: Path, job: str) -> str:
    """Return all that the ranks of a job said; of all jobs, of an array's, or of one of its tasks (``4711_3_``)."""
    return "\n".join(file.read_text() for file in sorted((run / "slurm" / "jobs").glob(f"*/*/{job}*_log.out")))


@contextmanager
def node_down(node: str, state: str = "down") -> Iterator[None]:
    """Take a node away for the length of the block, with what runs there; ``drain`` leaves that running."""
    ask("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")
    try:
        yield
    finally:
        # It may have come back by itself, and then refuses to be resumed.
        resume = ["/usr/bin/env", "scontrol", "update", f"nodename={node}", "state=resume"]
        subprocess.run(resume, capture_output=True)


def step_of(task: str) -> str:
    """Return the step in which a running task works."""
    steps = ask("squeue", "-h", "-s", "-j", task, "-o", "%i").splitlines()
    return next(step for step in steps if step.endswith(".0"))
