"""Stop requests: signals set a flag, and long loops check it where they can checkpoint."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals with which schedulers, launchers and terminals ask a run to stop."""
SAME_REQUEST_SECONDS = 2.0
"""Seconds within which a second signal of the same kind counts as the same request: launcher, terminal and scheduler
may each deliver it."""


class StopRequest:
    """A flag: calling the object returns whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked = False
        self._first: dict[int, float] = {}

    def __call__(self) -> bool:
        """Return whether a stop was requested."""
        return self._asked

    def ask(self) -> None:
        """Request a stop from within this process, in any thread."""
        self._asked = True

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.  The first of its kind requests a stop; after ``SAME_REQUEST_SECONDS`` another one acts at
        once.

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
"""Stop request of the ``stop_on`` blocks that this process is in."""


def requested() -> bool:
    """Return whether this process was asked to stop and is still in a ``stop_on`` block."""
    return _current is not None and _current()


def ignore(*numbers: signal.Signals) -> None:
    """Make this process ignore the given signals from now on."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def leave_to_the_run() -> None:
    """Make a helper process ignore SIGINT and SIGUSR2.  All processes of a run get them, but the run decides when to
    stop."""
    ignore(signal.SIGINT, signal.SIGUSR2)


@contextmanager
def stop_on(*numbers: signal.Signals, afterwards: signal.Handlers | None = None) -> Iterator[StopRequest]:
    """Turn the given signals into a flag within the block.

    A second signal of the same kind within ``SAME_REQUEST_SECONDS`` is the same request; a later one acts at once.
    Nested blocks share one request, so no block misses a signal that came before or after it.
    Outside the main thread Python handles no signals, so no stop is requested there.

    Args:
        numbers: signals that request a stop.
        afterwards: handler of the signals after the block; None: the handler before the block.
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
    """Request a stop after ``seconds``, unless the block ends earlier; None: never."""
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
