"""A stop request: signals set a flag, and long loops read it where they can checkpoint."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals by which schedulers, launchers and terminals ask a run to stop."""
SAME_REQUEST_SECONDS = 2.0
"""Seconds in which a second signal of the same kind repeats the first: launchers, terminals and schedulers may all
deliver one stop."""


class StopRequest:
    """Calling it tells whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked = False
        self._first: dict[int, float] = {}

    def __call__(self) -> bool:
        """Return whether a stop was requested."""
        return self._asked

    def ask(self) -> None:
        """Request a stop from within this process; any thread may."""
        self._asked = True

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first of its kind requests a stop, one that comes later than its repeats acts at once.

        Raises:
            KeyboardInterrupt: a later SIGINT.
        """
        now = time.monotonic()
        if now - self._first.setdefault(number, now) <= SAME_REQUEST_SECONDS:
            self.ask()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


_current: StopRequest | None = None
"""Request of the blocks that this process is in."""


def requested() -> bool:
    """Return whether this process was asked to stop and has not yet left the outermost block that heeds it."""
    return _current is not None and _current()


def ignore(*numbers: signal.Signals) -> None:
    """Make this process ignore signals from now on."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def leave_to_the_run() -> None:
    """Make a helper process ignore what Ctrl-C and schedulers send to all processes of a run, which decides itself."""
    ignore(signal.SIGINT, signal.SIGUSR2)


@contextmanager
def stop_on(*numbers: signal.Signals, afterwards: signal.Handlers | None = None) -> Iterator[StopRequest]:
    """Turn the given signals into a flag for the length of the block.

    A second signal of the same kind within ``SAME_REQUEST_SECONDS`` is the same request; a later one acts at once.
    Nested blocks share one request: what came before an inner block, or too late for it, is known to all.
    Outside the main thread, where Python handles no signals, nobody can ask.

    Args:
        numbers: signals.
        afterwards: what the process does with them after the block; None: as before it.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    outer, before = _current, {}
    request = _current = outer or StopRequest()
    try:
        for number in numbers:
            before[number] = signal.signal(number, request.note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if afterwards is None else afterwards)
        _current = outer


@contextmanager
def stop_after(seconds: float | None, request: StopRequest) -> Iterator[None]:
    """Request a stop after so many seconds, unless the block ends before; None: never."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(max(0.0, seconds), request.ask)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
