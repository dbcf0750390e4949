"""A stop request: signals set a flag, and long loops read it where they can checkpoint."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Calling it tells whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """Return whether a signal came."""
        return self.signal is not None


_open: list[StopRequest] = []
"""Of the blocks that this process is in, the outermost first: a signal is for all of them."""


def requested() -> bool:
    """Return whether somebody asked this process to stop, and it has not yet left the block that heeds it."""
    return any(one() for one in _open)


def leave_to_the_run() -> None:
    """Make a helper process ignore what Ctrl-C and schedulers send to all processes of a run, which decides itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextmanager
def stop_on(*numbers: signal.Signals) -> Iterator[StopRequest]:
    """Turn the given signals into a flag for the length of the block; the second of the same kind acts at once.

    Blocks may be nested: what came too late for an inner one to heed is known to those around it.
    Outside the main thread, where Python handles no signals, nobody can ask.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, object] = {}

    def note(number: int, frame: FrameType | None) -> None:
        for one in _open:
            one.signal = signal.Signals(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    _open.append(request)
    try:
        for number in numbers:
            before[number] = signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        _open.remove(request)


@contextmanager
def stop_after(seconds: float | None) -> Iterator[None]:
    """Send this process SIGTERM after so many seconds, unless the block ends before; None: never."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(max(0.0, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a signal on its way arrives while somebody listens
