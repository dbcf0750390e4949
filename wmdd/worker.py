"""A worker process that does runs for its parent: ``python -m wmdd.worker FD``.

Parent and worker share only one duplex pipe, so the death of one never blocks the other.  The parent sends one run at a
time, and None at the end.  The worker answers each run with None, or with the error that ended it.
"""

import importlib
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from wmdd.errors import EXIT_RESUMABLE, InputError, Interrupted, WmddError
from wmdd.runtime import interpreter
from wmdd.runtime.log import on_screen
from wmdd.runtime.signals import STOPS, StopRequest, stop_on

if TYPE_CHECKING:
    from wmdd.config.schema import Config

GRACE_SECONDS = 20.0
"""Seconds that a worker has to checkpoint and exit after a stop request; then it is killed."""
_MESSAGE_LENGTH = 4000
"""Maximum length of an error message, in characters.  A short answer is sent in one piece, even by a dying process."""


def do(config: "Config", folder: Path) -> None:
    """Complete a run up to its students.  The launching command reports all its runs together.

    Raises:
        Interrupted: a stop was requested; finished work is kept.
        WmddError: the run failed.
    """
    from wmdd import pipeline

    pipeline.run(config, folder, share=pipeline.Share(("teacher", "distill", "students")))


def main(pipe: int) -> None:
    """Do runs until the parent ends or sends None.

    The parent has blocked the stop signals; this function unblocks them.  It ignores them after the last run, because a
    late signal must not kill a worker that reports and exits.

    Args:
        pipe: file descriptor of the worker's end of the pipe.
    """
    interpreter.expect_many_objects()
    parent = Connection(pipe)
    failure = None
    with on_screen(logging.WARNING), stop_on(*STOPS, afterwards=signal.SIG_IGN) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        todo: SimpleQueue[Any] = SimpleQueue()
        begun = threading.Event()
        threading.Thread(target=_listen, args=(parent, todo, stop, begun), daemon=True).start()
        importlib.import_module("wmdd.pipeline")  # imports torch, which takes seconds
        begun.set()
        try:
            for config, folder in iter(todo.get, None):
                do(config, folder)
                _answer(parent, None)
        except WmddError as error:
            failure = error
    if failure:
        _answer(parent, failure)


def _listen(parent: Connection, todo: "SimpleQueue[Any]", stop: StopRequest, begun: threading.Event) -> None:
    """Queue the runs that the parent sends.  When the parent sends None or is gone, end this process."""
    with suppress(EOFError, OSError):
        while run := parent.recv():
            todo.put(run)
    if not begun.is_set():
        os._exit(EXIT_RESUMABLE)
    stop.ask()
    todo.put(None)
    with suppress(EOFError, OSError):
        parent.recv()  # returns when the parent ends
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_RESUMABLE)


def _answer(parent: Connection, failure: WmddError | None) -> None:
    with suppress(OSError):  # the parent is gone
        parent.send(None if failure is None else (failure.exit_code, str(failure)[:_MESSAGE_LENGTH]))


def unpacked(failure: tuple[int, str]) -> WmddError:
    """Return the error that a worker's answer describes."""
    code, message = failure
    kinds: tuple[type[WmddError], ...] = (InputError, Interrupted)
    return next((kind for kind in kinds if kind.exit_code == code), WmddError)(message)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except KeyboardInterrupt:
        interpreter.end(130)
    interpreter.end(0)
