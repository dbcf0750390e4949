"""Log messages: on standard error, and in a file of the run folder.

Modules log to ``logging.getLogger(__name__)``; modules of bench, slurm and sweeps add the prefix ``wmdd.``.  INFO is
for the user, WARNING for problems that any rank reports, DEBUG only for the file.  Commands and ``wmdd.run`` attach
handlers to the logger ``wmdd`` while they work.  They never change the root logger.
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
"""Width of output to a file or a pipe, in columns: more than any table needs.  Tables are not padded to it"""


def _as_wide_as_needed(**options: Any) -> Console:
    """Return a console as wide as its terminal or COLUMNS.  Without either it is so wide that no table is cut off."""
    found = Console(**options)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=_NO_TERMINAL, **options)


console = _as_wide_as_needed(stderr=True, highlight=False)
"""Console for progress and messages, on standard error.  Results of commands go to standard output."""


def results() -> Console:
    """Return a console for the results of a command, on standard output."""
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
    """Appends messages to a file.  The first message creates the file.  A full disk does not stop the run."""

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
    """Show messages of this level and above on standard error within the block.

    A nested block can only raise the level.  A level that the caller has set on the logger ``wmdd`` also only raises
    it.
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
    """Return whether standard error is a terminal that shows messages of level INFO."""
    screen = _screen()
    return console.is_terminal and screen is not None and screen.level <= logging.INFO


def _screen() -> _Screen | None:
    return next((handler for handler in _logger.handlers if isinstance(handler, _Screen)), None)


@contextmanager
def in_file(path: Path, rank: int = 0) -> Iterator[Callable[[], None]]:
    """Write the messages of the block to a file, and the error that ends the block; a bug with its traceback.

    Yields a function that opens the file; until it is called, messages wait in memory.  The file is for people: no
    program reads it, and it may be deleted at any time.

    Args:
        path: log file of rank 0, with all messages.
        rank: rank of this process.  Ranks other than 0 write warnings and errors to ``NAME.rankN.log``.
    """
    own = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}.log")
    file = _LogFile(own, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s", "%Y-%m-%d %H:%M:%S%z"))
    waiting = MemoryHandler(capacity=1)  # without a target it keeps all messages, with a target it forwards each
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
    """Return the log record of the error that ended the work."""
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    trace = None if stopped or isinstance(error, WmddError) else (type(error), error, error.__traceback__)
    level = logging.INFO if stopped else logging.ERROR
    return _logger.makeRecord(_logger.name, level, __file__, 0, str(error) or type(error).__name__, (), trace)


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Attach a handler to the logger ``wmdd``, which passes all messages to its handlers and none to the root
    logger."""
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
