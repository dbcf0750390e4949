"""What a process says while it works: shown on standard error, and kept in a file of the run.

Modules log to ``logging.getLogger(__name__)``; those of bench, slurm and sweeps put ``wmdd.`` before their names.  INFO
is for the user who follows the work, WARNING for what every rank should report, DEBUG for the file alone.  Commands and
``wmdd.run`` attach handlers to the logger ``wmdd`` while they work.  The root logger is never touched.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from rich.console import Console

from wmdd.errors import Interrupted, WmddError

_NO_TERMINAL = 200
"""Columns of a table in a file or a pipe: more than any needs, for they are not filled up"""


def _as_wide_as_needed(**options: Any) -> Console:
    """Return a console as wide as its terminal; without one, or COLUMNS, no table is cut off."""
    found = Console(**options)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=_NO_TERMINAL, **options)


console = _as_wide_as_needed(stderr=True, highlight=False)
"""Progress and messages go to standard error; results that were asked for go to standard output."""


def results() -> Console:
    """Return a console for what a command was asked to tell."""
    return _as_wide_as_needed()


_logger = logging.getLogger("wmdd")


class _Screen(logging.Handler):
    """Prints messages without markup, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(self.format(record), markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """Appends messages to a file, which its first message creates.  A disk that takes none stops no run."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def on_screen(level: int = logging.INFO) -> Iterator[None]:
    """Show messages of this level and above on standard error for the length of the block.

    Within another such block it can only raise the level.  So can a level that the caller gave the logger ``wmdd``.
    """
    outer = _screen()
    screen = outer or _Screen()
    before = screen.level
    screen.setLevel(max(before, level, _logger.level))
    try:
        if outer:
            yield
        else:
            with _attached(screen):
                yield
    finally:
        screen.setLevel(before)


def shows_progress() -> bool:
    """Return whether standard error is a terminal on which messages of level INFO are shown."""
    screen = _screen()
    return console.is_terminal and screen is not None and screen.level <= logging.INFO


def _screen() -> _Screen | None:
    return next((handler for handler in _logger.handlers if isinstance(handler, _Screen)), None)


@contextmanager
def in_file(path: Path, rank: int = 0) -> Iterator[Callable[[], None]]:
    """Keep the messages of the block in a file, and the error that ends it, with its trace if it is a bug.

    Yields a function that opens the file; until it is called, messages wait in memory.  The file is for people: nothing
    reads it, and it may be deleted at any time.

    Args:
        path: file of rank 0, which keeps every message.
        rank: number of this process; another than 0 writes to ``NAME.rankN.log``, from its first warning on.
    """
    own = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}.log")
    file = _LogFile(own, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s", "%Y-%m-%d %H:%M:%S%z"))
    waiting = MemoryHandler(capacity=1)  # without a target it keeps all, with one it passes each on
    waiting.setLevel(logging.DEBUG if rank == 0 else logging.WARNING)

    def open_file() -> None:
        waiting.setTarget(file)
        waiting.flush()

    with closing(file), _attached(waiting):
        try:
            yield open_file
        except BaseException as error:
            if (last := _last_record(error)).levelno >= waiting.level:
                waiting.handle(last)
            raise


def _last_record(error: BaseException) -> logging.LogRecord:
    """Return what the file says of the error that ended the work."""
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    trace = None if stopped or isinstance(error, WmddError) else (type(error), error, error.__traceback__)
    level = logging.INFO if stopped else logging.ERROR
    return _logger.makeRecord(_logger.name, level, __file__, 0, str(error) or type(error).__name__, (), trace)


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Attach a handler to the logger ``wmdd``, which passes everything to its handlers and nothing to the root's."""
    before = _logger.level, _logger.propagate
    _logger.addHandler(handler)
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        handler.close()
        _logger.setLevel(before[0])
        _logger.propagate = before[1]
