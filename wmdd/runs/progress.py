"""Progress files in the run folder: each process writes its own, and ``wmdd status`` reads them."""

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.runs.folder import RunFolder
from wmdd.runtime.progress_bars import observed_by
from wmdd.storage.files import read_json, write_json


def write_interval(environment: Mapping[str, str]) -> float:
    """Return the least seconds between two writes of a process. A change of stage is written at once.

    A thousand tasks of a SLURM array share one folder, so each of them writes seldom.
    """
    return 60.0 if "SLURM_JOB_ID" in environment else 5.0


@dataclass(frozen=True)
class ProcessState:
    """The last progress report of one process."""

    stage: str
    """Title of the work; ``interrupted`` or ``failed`` after such an end"""
    done: int
    total: int
    unit: str
    rate: float
    """Steps per second since this process began the stage; 0 if unknown"""
    age: float
    """Seconds since the report was written"""
    process: str
    """Host and process number"""
    message: str
    """Reason of the end; empty while the process runs"""
    interval: float = 5.0
    """Seconds between two reports of the process"""

    @property
    def left(self) -> float | None:
        """Seconds to the end of the stage at this rate; None if unknown."""
        return (self.total - self.done) / self.rate if self.rate else None


@contextmanager
def reported(folder: RunFolder, name: str) -> Iterator[None]:
    """Write the progress of this process to ``RUN/progress/NAME.json``, and delete the file when the work is done.

    Nothing is written before the folder is bound to the run: it may belong to another run.

    An interrupted or failed process leaves the reason in its file.
    """
    writer = _Writer(folder.path / "progress" / f"{name}.json")
    try:
        with observed_by(writer.observe):
            yield
        writer.path.unlink(missing_ok=True)
    except InputError:
        raise  # no work was started
    except BaseException as error:
        kind = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        writer.last_words(kind, str(error).partition("\n")[0] or type(error).__name__)
        raise


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: dict[str, tuple[float, int]] = {}
        self._last: tuple[str, int, int, str] = ("starting", 0, 0, "")
        self._written = float("-inf")
        self._interval = write_interval(os.environ)

    def observe(self, title: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        turned = title != self._last[0]
        begun, first = self._stages.setdefault(title, (now, done))
        self._last = (title, done, total, unit)
        if turned or now - self._written > self._interval:
            rate = (done - first) / (now - begun) if now > begun else 0.0
            self._write(rate, "")

    def last_words(self, kind: str, message: str) -> None:
        _, done, total, unit = self._last
        self._last = (kind, done, total, unit)
        self._write(0.0, message)

    def _write(self, rate: float, message: str) -> None:
        if not (self.path.parent.parent / "config.json").exists():
            return
        self._written = time.monotonic()
        stage, done, total, unit = self._last
        content = {"stage": stage, "done": done, "total": total, "unit": unit, "rate": rate, "message": message}
        with suppress(WmddError):  # a progress file is no reason to stop; the work itself reports a full disk
            content |= {"interval": self._interval, "time": time.time(), "process": f"{platform.node()}:{os.getpid()}"}
            write_json(self.path, content, sync=False)  # no result depends on it


def read(folder: RunFolder) -> list[ProcessState]:
    """Return the last report of each process of a run. Finished processes have none."""
    found = []
    for path in sorted((folder.path / "progress").glob("*.json")):
        try:
            content: dict[str, Any] = read_json(path)
            age = max(0.0, time.time() - content.pop("time"))
            found.append(ProcessState(**content, age=age))
        except (WmddError, TypeError, KeyError):
            continue  # just being replaced, or damaged; no result depends on it
    return found
