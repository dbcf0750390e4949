"""The trial log: what a sweep is, and one small JSON file for each trial.  It is the truth; Ray's files are not kept.

DIR/sweep.json                 the config that is varied, space, objective, search, scheduler, seed: what a sweep is
DIR/trials/trial-00007.json    values, state, what it reported, its error; written whole, by one process
"""

import itertools
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
"""What a trial reports: ``rung`` (from 1), ``iteration``, ``seconds`` since it began, ``synthesis_seconds``, and what
was measured: ``top1``, ``w2``, ``lrs``, and ``seeds``: the top-1 of each student seed."""


@dataclass
class Trial:
    """One trial of a sweep."""

    number: int
    """0 is the config as it stands"""
    values: Values
    state: State = "running"
    """``stopped``: by the scheduler, before its end"""
    reports: list[Report] = field(default_factory=list)
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state != "running"

    @property
    def last(self) -> Report:
        """The last report, empty if there is none."""
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
        """In the order of their numbers"""

    @staticmethod
    def load(path: Path) -> "Log":
        """Read a sweep.

        Raises:
            InputError: the folder holds no sweep.
            WmddError: a file of it is damaged.
        """
        if not (path / "sweep.json").exists():
            raise InputError(f"{path}: holds no sweep (no sweep.json); name the --out of a `wmdd sweep run`")
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
                raise WmddError(f"{file}: is no trial of this version; delete it to run the trial again") from None
            trial.values = {key: tuple(v) if isinstance(v, list) else v for key, v in trial.values.items()}
            self.trials.append(trial)

    @property
    def identity(self) -> dict[str, Any]:
        """What the sweep is: config, space, budget, objective, search, scheduler, seed."""
        found: dict[str, Any] = read_json(self.path / "sweep.json")
        return found

    @contextmanager
    def held(self, identity: dict[str, Any]) -> Iterator[None]:
        """Bind the folder to a sweep or check that it is bound to this one, and keep other processes out.

        Raises:
            InputError: another process runs it, or the folder belongs to another sweep; the message names what differs.
        """
        file = self.path / "sweep.json"
        if not file.exists() and self.path.exists() and any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise InputError(f"{self.path}: is not empty and holds no sweep (no sweep.json); use another --out")
        if file.exists() and (differing := _differences(read_json(file), identity)):
            raise InputError(
                f"{self.path}: belongs to another sweep (differs in {', '.join(differing)}); use another --out"
            )
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path / ".lock", stop=lambda: True))  # waits for nobody
            except Interrupted:
                raise InputError(f"{self.path}: another process is running this sweep; wait for it") from None
            if not file.exists():
                write_json(file, identity)
            self._read()
            yield

    def write(self, trial: Trial) -> None:
        """Keep a trial, new or changed."""
        if trial.number == len(self.trials):
            self.trials.append(trial)
        self.trials[trial.number] = trial
        write_json(self._file(trial.number), asdict(trial))

    def _file(self, number: int) -> Path:
        return self.path / "trials" / f"trial-{number:05d}.json"


def savings(trials: list[Trial]) -> tuple[int, float, float] | None:
    """Return how many trials the scheduler stopped, the seconds all took, and those they would have taken to the end.

    The latter is an estimate: a stopped trial would have taken what the others took on average.  None if no trial was
    stopped or none came to its end.
    """
    stopped = [trial.seconds for trial in trials if trial.state == "stopped"]
    done = [trial.seconds for trial in trials if trial.state == "done"]
    if not stopped or not done:
        return None
    spent = sum(stopped) + sum(done)
    return len(stopped), spent, sum(done) + len(stopped) * sum(done) / len(done)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs of two sweeps and may not when one goes on: all but where and how fast it is done."""
    one, other = flatten(old), flatten(new)
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    free = {f"config.{key}" for key, what in DECIDES.items() if what == "nothing"}
    return [key for key in keys if key not in free and not key.startswith("provenance")]
