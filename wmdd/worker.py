"""One of several processes that do runs for another: ``python -m wmdd.worker FD``.

Parent and worker share one duplex pipe and nothing else, so the death of one never blocks the other.  The parent sends
runs, one at a time, and None for the end.  The worker answers each run with None, or with what ended it.
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
from wmdd.runtime.garbage import expect_many_objects
from wmdd.runtime.log import on_screen
from wmdd.runtime.signals import STOPS, StopRequest, stop_on

if TYPE_CHECKING:
    from wmdd.config.schema import Config

GRACE_SECONDS = 20.0
"""Seconds that a worker has to checkpoint and exit once it was asked to stop; then it is killed."""
_MESSAGE_LENGTH = 4000
"""Characters of an error that the parent gets: an answer is sent in one piece, never half by a process being killed."""


def do(config: "Config", folder: Path) -> None:
    """Do what is missing of a run, up to its students; who launched several runs reports them together.

    Raises:
        Interrupted: a stop was requested; what was done is kept.
        WmddError: the run failed.
    """
    from wmdd import pipeline

    pipeline.run(config, folder, share=pipeline.Share(("teacher", "distill", "students")))


def main(pipe: int) -> None:
    """Do runs until the parent ends or says that there are no more.

    Stop signals, blocked by the parent until here, are heeded from here on, and ignored once the last run has ended:
    a late one must not kill a worker that reports and exits.

    Args:
        pipe: file descriptor of this worker's end of the pipe.
    """
    expect_many_objects()
    parent = Connection(pipe)
    failure = None
    with on_screen(logging.WARNING), stop_on(*STOPS, afterwards=signal.SIG_IGN) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        todo: SimpleQueue[Any] = SimpleQueue()
        begun = threading.Event()
        threading.Thread(target=_listen, args=(parent, todo, stop, begun), daemon=True).start()
        importlib.import_module("wmdd.pipeline")  # and with it torch, which takes seconds
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
    """Pass on what the parent sends; at its end, or without a parent, see to it that this process ends."""
    with suppress(EOFError, OSError):
        while run := parent.recv():
            todo.put(run)
    if not begun.is_set():
        os._exit(EXIT_RESUMABLE)
    stop.ask()
    todo.put(None)
    with suppress(EOFError, OSError):
        parent.recv()  # nothing comes but the parent's end
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_RESUMABLE)


def _answer(parent: Connection, failure: WmddError | None) -> None:
    with suppress(OSError):  # the parent is gone
        parent.send(None if failure is None else (failure.exit_code, str(failure)[:_MESSAGE_LENGTH]))


def unpacked(failure: tuple[int, str]) -> WmddError:
    """Return the error that a worker's answer tells of."""
    code, message = failure
    kinds: tuple[type[WmddError], ...] = (InputError, Interrupted)
    return next((kind for kind in kinds if kind.exit_code == code), WmddError)(message)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
