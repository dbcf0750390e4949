"""What the processes of a run are doing, in the run folder: written by them, read by ``wmdd status``."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.runs.folder import RunFolder
from wmdd.runtime.progress_bars import observed_by
from wmdd.storage.files import read_json, write_json

_WRITE_EVERY_SECONDS = 5.0
"""Seconds between two writes; a change of stage is written at once."""


@dataclass(frozen=True)
class ProcessState:
    """What one process last said."""

    stage: str
    """Title of the piece of work; ``interrupted`` or ``failed`` after it ended so"""
    done: int
    total: int
    unit: str
    rate: float
    """Steps per second since the stage began here; 0 when not known"""
    age: float
    """Seconds since it was written"""
    process: str
    """Host and process number"""
    message: str
    """Why it ended, if it did"""

    @property
    def left(self) -> float | None:
        """Seconds to the end of the stage at this rate; None when not known."""
        return (self.total - self.done) / self.rate if self.rate else None


@contextmanager
def reported(folder: RunFolder, name: str) -> Iterator[None]:
    """Write what goes on in this process to ``RUN/progress/NAME.json``; the file goes when the work is done.

    Nothing is written before the folder is bound to the run: it may be somebody else's.

    An interrupted or failed process leaves its last words there.
    """
    writer = _Writer(folder.path / "progress" / f"{name}.json")
    try:
        with observed_by(writer.observe):
            yield
        writer.path.unlink(missing_ok=True)
    except InputError:
        raise  # nothing was started
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

    def observe(self, title: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        turned = title != self._last[0]
        begun, first = self._stages.setdefault(title, (now, done))
        self._last = (title, done, total, unit)
        if turned or now - self._written > _WRITE_EVERY_SECONDS:
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
        with suppress(WmddError):  # a full disk will be told by the work itself, and this is no reason to stop it
            write_json(self.path, {**content, "time": time.time(), "process": f"{platform.node()}:{os.getpid()}"})


def read(folder: RunFolder) -> list[ProcessState]:
    """Return what the processes of a run last said; those that finished have left nothing."""
    found = []
    for path in sorted((folder.path / "progress").glob("*.json")):
        try:
            content: dict[str, Any] = read_json(path)
            age = max(0.0, time.time() - content.pop("time"))
            found.append(ProcessState(**content, age=age))
        except (WmddError, TypeError, KeyError):
            continue  # just being replaced, or damaged: it decides nothing
    return found
