"""Attempts: each start of a task is an empty file, and its name holds all that is known of it.

``RUN/slurm/attempts/4711/0/3.1`` is the second start of task 3 of job 4711.  Once that start has ended, the name goes
on with the outcome, the seconds and the node: ``3.1.failed.118.node7``.  A listing is the history of the tasks: nothing
is opened, no file has two writers, and a folder holds 100 tasks at most.  ``teardown.sh`` reads and writes these names
too: it counts the failures and marks a start that was killed.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = "slurm/attempts"
"""Folder of the attempts, in the run folder."""
STARTS_WITHOUT_PROGRESS = 3
"""A task that was stopped so often in a row at the same point is stuck."""
_TASKS_PER_FOLDER = 100
"""The same number as in ``teardown.sh``."""


def node() -> str:
    """Return SLURM's name of the node of this process."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


@dataclass
class Attempt:
    """One start of a task, seen from one of its ranks."""

    path: Path
    """File of the start"""
    begun: float

    @classmethod
    def of(cls, run: Path, task: str) -> "Attempt":
        """Return the present start of a task."""
        job, _, index = task.partition("_")
        number = int(index or "0")
        folder = run / FOLDER / job / str(number // _TASKS_PER_FOLDER)
        return cls(folder / f"{number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}", time.monotonic())

    def begin(self) -> None:
        """Write the file of the start."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def end(self, outcome: str) -> None:
        """Write how the start ended: done, failed, refused, stuck, stopped-STATE."""
        self.path.replace(self._ended(outcome))

    def blame_node(self) -> None:
        """Write that the node of this rank has failed the device check; any rank may."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._ended("device").touch()

    def is_stuck(self, state: str) -> bool:
        """Return whether the starts before this one were stopped in the same state as well."""
        number, _, start = self.path.name.partition(".")
        earlier = [f"{number}.{int(start) - back}.stopped-{state}." for back in range(1, STARTS_WITHOUT_PROGRESS)]
        names = os.listdir(self.path.parent)
        return all(any(name.startswith(prefix) for name in names) for prefix in earlier)

    def _ended(self, outcome: str) -> Path:
        seconds = round(time.monotonic() - self.begun)
        return self.path.with_name(f"{self.path.name}.{outcome}.{seconds}.{node()}")


@dataclass(frozen=True)
class History:
    """All starts of one task."""

    starts: int = 0
    last: str | None = None
    """Outcome of the last start: done, failed, refused, device, killed, stopped or stuck; None while it runs, or when
    its node was lost"""
    node: str = ""
    """Node on which the last start ended"""
    seconds: int = 0
    """Seconds of all starts whose end is known"""
    restarts: int = 0
    """Number of the last start; a start that ended before Python was up may have left no file of its own"""
    bad_nodes: tuple[str, ...] = ()
    """Nodes that failed the device check"""


def histories(run: Path, jobs: Iterable[str]) -> dict[str, History]:
    """Return the history of each task of some jobs, by SLURM's name of the task."""
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        for part in listing(run / FOLDER / job):
            for name in listing(run / FOLDER / job / part):
                index, start, *end = name.split(".", 2)
                # A plain job has the task 0 alone, and an array of one task is a plain job.
                found[f"{job}_{index}"][int(start)] += end
    return {task: _history(starts) for task, starts in found.items()}


def of_task(known: dict[str, History], task: str) -> History:
    """Return the history of a task that SLURM calls ``4711_3``, or ``4711`` where it is a plain job."""
    return known.get(task if "_" in task else f"{task}_0", History())


def _history(starts: dict[int, list[str]]) -> History:
    last = max(starts)
    ends = {number: [end.split(".", 2) for end in names] for number, names in starts.items()}
    bad = sorted({where for some in ends.values() for outcome, _, where in some if outcome == "device"})
    seconds = sum(max((int(end[1]) for end in some), default=0) for some in ends.values())
    # The rank that finds its node bad says more than rank 0, which only loses that rank.
    told = sorted(ends[last], key=lambda end: end[0] != "device")
    outcome, _, where = told[0] if told else (None, "0", "")
    if outcome is not None:
        outcome = outcome.partition("-")[0]
    return History(len(starts), outcome, where, seconds, last, tuple(bad))


def listing(folder: Path) -> list[str]:
    """Return the names in a folder; none where there is no such folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
