"""What SLURM's own programs are asked, and their answers as values; every failure is one clear line."""

import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wmdd.errors import InputError, WmddError

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
"""States after which nothing more happens by itself."""
POLL_SECONDS = 30.0
"""Seconds between two questions to the controller while something lasts."""
_FIELDS = ("JobArrayID", "State", "NodeList", "Reason", "RestartCnt", "TimeUsed")


@dataclass(frozen=True)
class Queued:
    """A task as ``squeue`` shows it."""

    task: str
    """``4711_3``, or ``4711`` when it is no array"""
    state: str
    node: str
    reason: str
    restarts: int
    seconds: int
    """Of its present start"""

    @property
    def active(self) -> bool:
        """Whether it may still do something."""
        return self.state not in ENDED and self.reason != "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Accounted:
    """A task as accounting knows it, all its starts together."""

    state: str
    node: str
    seconds: int


def require(*programs: str) -> None:
    """Check that SLURM's programs are installed.

    Raises:
        InputError: one is not on the PATH.
    """
    for program in programs:
        if shutil.which(program) is None:
            raise InputError(
                f"{program}: not found on the PATH; run this on a login node of the cluster,"
                " or start a small one here: wmdd slurm local start"
            )


def call(*command: str, timeout: float = 60, given: str | None = None) -> str:
    """Run one of SLURM's programs, with something on its standard input or nothing, and return what it prints.

    Raises:
        InputError: the program is missing.
        WmddError: it failed or did not answer; the message quotes it.
    """
    require(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, input=given)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise WmddError(f"{command[0]}: no answer in {timeout:.0f} s; the controller may be down") from None
    if done.returncode:
        raise WmddError(complaint(done.stderr or done.stdout, command[0]))
    return done.stdout


def complaint(stderr: str, program: str) -> str:
    """Return the first line that says what is wrong, without the prefixes of SLURM's messages."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = next((line for line in lines if "error:" in line), lines[0] if lines else "failed without a message")
    for prefix in (f"{program}:", "error:", "allocation failure:"):
        told = told.removeprefix(prefix).strip()
    return f"{program}: {told}"


def queue(jobs: Iterable[str]) -> dict[str, Queued]:
    """Return what the controller still knows of these jobs, by task; one call however many tasks there are."""
    wanted = set(jobs)
    if not wanted:
        return {}
    layout = ",".join(f"{field}:|" for field in _FIELDS)
    command = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(sorted(wanted))}", "-O", layout)
    try:
        answer = call(*command)
    except WmddError as error:
        if "Invalid job id" in str(error):  # none of them is known any more
            return {}
        raise
    found = {}
    for line in answer.splitlines():
        task, state, node, reason, restarts, elapsed = line.rstrip("|").split("|")[: len(_FIELDS)]
        found[task] = Queued(task, state, node, reason, int(restarts or 0), _seconds(elapsed))
    return found


def accounted(jobs: Iterable[str]) -> dict[str, Accounted] | None:
    """Return what accounting knows of these jobs, by task; None where the cluster keeps no accounts.

    Tasks of an array that never started stand together, under the array's number.
    """
    wanted = ",".join(sorted(set(jobs)))
    if not wanted or shutil.which("sacct") is None:
        return None
    layout = "--format=JobID,State,NodeList,ElapsedRaw"
    try:
        answer = call("sacct", "-n", "-P", "-X", "--duplicates", f"--jobs={wanted}", layout)
    except WmddError:  # disabled, or its daemon is down: the run's own files are enough
        return None
    found: dict[str, Accounted] = {}
    for line in answer.splitlines():
        task, state, node, elapsed = line.split("|")
        task = task.partition("_[")[0]  # those of an array that never started share a line
        before = found[task].seconds if task in found else 0
        found[task] = Accounted(state.split()[0], node, before + int(elapsed or 0))
    return found


def largest_array() -> int:
    """Return how many tasks one array may have here (SLURM's default where there is no cluster to ask)."""
    try:
        settings = call("scontrol", "show", "config")
    except WmddError:
        return 1000
    for line in settings.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return int(value) - 1
    return 1000


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are left alone."""
    if jobs:
        call("scancel", "--quiet", *jobs)


def cancel_all(jobs: Sequence[str], patience: float = 600) -> int:
    """Cancel jobs and wait until none is left in the queue; return how many tasks there were.

    A task that was about to requeue itself may come back once: it is cancelled again.  A task that is ending is left
    alone.  The controller is asked less and less often: at last every 30 seconds.

    Raises:
        WmddError: some did not go away in time.
    """
    before = sum(task.state not in ENDED for task in queue(jobs).values())
    deadline, pause = time.monotonic() + patience, 0.5
    while left := [task for task in queue(jobs).values() if task.state not in ENDED]:
        if time.monotonic() > deadline:
            raise WmddError(f"{len(left)} tasks are still in the queue, such as {left[0].task} ({left[0].state})")
        cancel(sorted({task.task.partition("_")[0] for task in left if task.state != "COMPLETING"}))
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
    return before


def throttle(job: str, parallel: int) -> None:
    """Change how many tasks of an array run at the same time."""
    call("scontrol", "update", f"jobid={job}", f"arraytaskthrottle={parallel}")


def unavailable_nodes() -> int:
    """Return the number of nodes that take no jobs at this moment: down, drained, in maintenance."""
    states = "down,drain,drained,draining,fail,maint,reboot,no_respond"
    return len(set(call("sinfo", "--noheader", "--Node", f"--states={states}", "--format=%N").split()))


def release(jobs: Sequence[str]) -> None:
    """Let held jobs start."""
    call("scontrol", "release", ",".join(jobs))


def _seconds(elapsed: str) -> int:
    """Return the seconds of ``[days-][[hours:]minutes:]seconds``."""
    days, dash, clock = elapsed.rpartition("-")
    parts = [int(part) for part in clock.split(":") if part.isdigit()]
    total = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    return total + (int(days) * 86400 if dash and days.isdigit() else 0)
