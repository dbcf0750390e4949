"""What was submitted for a run, in files of its own folder: ``RUN/slurm/submission-0001.json`` and so on.

Only ``submit`` writes them, one each time.  They say which task does which items and which files prove that an item is
done, so that ``status`` needs no torch, opens no file per task, and works where the cluster keeps no accounts.
"""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slurm.attempts import listing
from slurm.profile import Stage
from wmdd.errors import InputError, WmddError
from wmdd.storage.files import read_json, write_json

VERSION = 2
JOBS = "slurm/jobs"
"""Folder of submitit's files, in the run folder: a folder for each job, and in it one for each task."""


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


def profile_of(run: Path) -> str:
    """Return the name, or the file, of the profile of the last submission."""
    return str(read_json(_files(run)[-1])["profile"])


class FileNames:
    """The names of the files in some folders, each folder listed once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        """Return whether there is a file of this path in the run folder."""
        folder, _, name = path.rpartition("/")
        if folder not in self._known:
            self._known[folder] = set(listing(self._run / folder))
        return name in self._known[folder]


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
