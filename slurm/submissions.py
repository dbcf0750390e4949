"""What was submitted for a run, in files of its own folder: ``RUN/slurm/submission-0001.json`` and so on.

Only ``submit`` writes them, one each time.  They say which task does which items and which files prove that an item is
done, so that ``status`` needs no torch, opens no file per task, and works where the cluster keeps no accounts.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slurm.profile import Stage
from slurm.task import ATTEMPTS
from wmdd.errors import InputError, WmddError
from wmdd.storage.files import read_json, write_json

VERSION = 1


@dataclass(frozen=True)
class Item:
    """A block, a student, the teacher or the report, and how its state is seen from outside."""

    index: int
    proof: tuple[str, ...]
    """Files in the run folder; the item is done when all are there"""
    parts: tuple[str, ...] = ()
    """The same for parts of a block that are finished before the whole"""


@dataclass(frozen=True)
class Submitted:
    """An array, or a single job, as it was submitted."""

    stage: Stage
    job: str
    gpus: int
    """Of one task"""
    ranks: int
    """Of one task"""
    tasks: tuple[tuple[Item, ...], ...]

    def names(self) -> list[str]:
        """Return SLURM's name of each task, in order: submitit makes a single one a plain job."""
        return [self.job] if len(self.tasks) == 1 else [f"{self.job}_{index}" for index in range(len(self.tasks))]


@dataclass(frozen=True)
class Attempts:
    """What the names in the folder of attempts tell of one task."""

    starts: int = 0
    last: str | None = None
    """How the last start ended: done, failed, requeued or stopped; None while it runs, or when it was killed"""
    seconds: int = 0
    """Of all starts that have ended by themselves"""
    restarts: int = 0
    """Number of the last start; one that ended before Python was up has left no mark of its own"""


def write(run: Path, profile: str, launched: Iterable[Submitted]) -> Path:
    """Write down a submission, in a file that no other one has."""
    jobs = [asdict(one) for one in launched]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"version": VERSION, "time": now, "profile": profile, "jobs": jobs}
    for number in itertools.count(len(_files(run)) + 1):
        path = run / "slurm" / f"submission-{number:04d}.json"
        try:
            write_json(path, content, new=True)
        except FileExistsError:  # another command has just submitted, and there are no locks
            continue
        return path
    raise AssertionError


def exists(run: Path) -> bool:
    """Return whether anything was submitted for a run."""
    return bool(_files(run))


def read(run: Path) -> list[Submitted]:
    """Return all that was submitted for a run, oldest first.

    Raises:
        InputError: nothing was, or the folder is no run.
    """
    launched = [_launched(job) for path in _files(run) for job in _jobs(path)]
    if not launched:
        raise InputError(f"{run}: nothing was submitted from here; RUN is the folder that wmdd slurm submit named")
    return launched


def marks(run: Path) -> dict[str, Attempts]:
    """Return what the tasks left in the folder of attempts, by task: one listing."""
    found: dict[str, Attempts] = defaultdict(Attempts)
    for name in _listing(run / ATTEMPTS):
        task, restart, *end = name.split(".")
        known, number = found[task], int(restart)
        latest = not known.starts or number >= known.restarts
        last = (end[0] if end else None) if latest else known.last
        seconds = known.seconds + (int(end[1]) if end else 0)
        found[task] = Attempts(known.starts + 1, last, seconds, max(known.restarts, number))
    return found


class FileNames:
    """The names of the files in some folders, each folder listed once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        """Return whether there is a file of this path in the run folder."""
        folder, _, name = path.rpartition("/")
        if folder not in self._known:
            self._known[folder] = set(_listing(self._run / folder))
        return name in self._known[folder]


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _files(run: Path) -> list[Path]:
    return sorted((run / "slurm").glob("submission-*.json"))


def _jobs(path: Path) -> list[dict[str, Any]]:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise WmddError(f"{path}: was written by another version of wmdd; move it away to submit anew")
    return list(found["jobs"])


def _launched(job: dict[str, Any]) -> Submitted:
    tasks = tuple(
        tuple(Item(item["index"], tuple(item["proof"]), tuple(item["parts"])) for item in task) for task in job["tasks"]
    )
    return Submitted(job["stage"], job["job"], job["gpus"], job["ranks"], tasks)
