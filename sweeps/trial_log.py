"""The folder of a sweep: its definition, and one small JSON file for each trial. Ray's own files are deleted.

DIR/sweep.json                 definition of the sweep: config, space, objective, search, scheduler, seed
DIR/trials/trial-00007.json    values, state, reports and error of a trial; written whole, by one process
DIR/checkpoints/               images of unfinished trials at their last report; written by the trials
DIR/confirm/                   the same files for the confirmation of the best trials
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sweeps.format import Values
from wmdd.config.schema import DECIDES
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.storage.files import flatten, locked, read_json, write_json

State = Literal["running", "done", "stopped", "failed"]
Report = dict[str, Any]
"""One report of a trial: ``rung`` (from 1), ``iteration``, ``seconds`` since the trial began, ``synthesis_seconds``.
The results are ``top1``, ``w2``, ``lrs`` and ``seeds`` (top-1 of each student seed)."""


@dataclass
class Trial:
    """One trial of a sweep."""

    number: int
    """Number from 0; trial 0 is the unchanged config"""
    values: Values
    state: State = "running"
    """``done``: complete; ``stopped``: ended early by the scheduler"""
    reports: list[Report] = field(default_factory=list)
    error: str | None = None
    """Error of a failed recipe; of a running trial: why it lost its worker"""
    of: int | None = None
    """In a confirmation: number of the trial of the sweep that is repeated"""
    repeat: int = 0
    """In a confirmation: which fresh seeds, from 1"""

    @property
    def finished(self) -> bool:
        """Whether the trial is done, stopped or failed."""
        return self.state != "running"

    @property
    def last(self) -> Report:
        """The last report; empty without a report."""
        return self.reports[-1] if self.reports else {}

    @property
    def seconds(self) -> float:
        """Wall-clock seconds up to the last report."""
        return float(self.last.get("seconds", 0.0))


class Log:
    """The folder of a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: list[Trial] = []
        """Trials in the order of their numbers"""

    @staticmethod
    def load(path: Path) -> "Log":
        """Read a sweep.

        Raises:
            InputError: the folder contains no sweep.
            WmddError: a file of the sweep is damaged.
        """
        if not (path / "sweep.json").exists():
            raise InputError(f"{path}: holds no sweep (no sweep.json); name the folder (--out) of a `wmdd sweep run`")
        log = Log(path)
        log._read()
        return log

    def _read(self) -> None:
        self.trials = []
        for number in itertools.count():
            file = self._file(number)
            if not file.exists():
                return
            try:
                trial = Trial(**read_json(file))
            except TypeError:
                raise WmddError(f"{file}: is not a trial of this version; delete it to run the trial again") from None
            trial.values = {key: tuple(v) if isinstance(v, list) else v for key, v in trial.values.items()}
            self.trials.append(trial)

    @property
    def identity(self) -> dict[str, Any]:
        """Definition of the sweep: config, space, budget, objective, search, scheduler, seed."""
        found: dict[str, Any] = read_json(self.path / "sweep.json")
        return found

    @contextmanager
    def held(self, identity: dict[str, Any], remedy: str = "use another --out") -> Iterator[None]:
        """Bind the folder to a sweep, or check that it is bound to this one, and lock it.

        Args:
            identity: definition of the sweep.
            remedy: what the user of another sweep's folder can do.

        Raises:
            InputError: another process runs the sweep, or the folder belongs to another sweep. The message names the
                differences.
        """
        file = self.path / "sweep.json"
        if not file.exists() and self.path.exists() and any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise InputError(f"{self.path}: is not empty and holds no sweep (no sweep.json); use another --out")
        if file.exists() and (differing := _differences(read_json(file), identity)):
            raise InputError(f"{self.path}: belongs to another sweep (differs in {', '.join(differing)}); {remedy}")
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path / ".lock", stop=lambda: True))  # does not wait
            except Interrupted:
                raise InputError(f"{self.path}: another process is running this sweep; wait for it") from None
            if not file.exists():
                write_json(file, identity)
            self._read()
            yield

    def write(self, trial: Trial) -> None:
        """Write a new or changed trial."""
        if trial.number == len(self.trials):
            self.trials.append(trial)
        self.trials[trial.number] = trial
        write_json(self._file(trial.number), asdict(trial))

    def checkpoint(self, number: int) -> Path:
        """Return the checkpoint file of a trial."""
        return self.path / "checkpoints" / f"trial-{number:05d}.safetensors"

    def _file(self, number: int) -> Path:
        return self.path / "trials" / f"trial-{number:05d}.json"


def savings(trials: list[Trial]) -> tuple[int, float, float] | None:
    """Return the number of stopped trials, the seconds of all trials, and the estimated seconds without stopping.

    The estimate gives every stopped trial the mean time of the complete ones. None if no trial was stopped or none is
    complete.
    """
    stopped = [trial.seconds for trial in trials if trial.state == "stopped"]
    done = [trial.seconds for trial in trials if trial.state == "done"]
    if not stopped or not done:
        return None
    spent = sum(stopped) + sum(done)
    return len(stopped), spent, sum(done) + len(stopped) * sum(done) / len(done)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differing keys that forbid resuming one sweep as the other: all but places and speed."""
    # As text: one iteration, 1, is not all iterations, 1.0.
    one, other = ({key: json.dumps(value) for key, value in flatten(each).items()} for each in (old, new))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    free = {f"config.{key}" for key, what in DECIDES.items() if what == "nothing"}
    return [key for key in keys if key not in free and not key.startswith("provenance")]
