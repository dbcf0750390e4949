"""Progress of long work: bars on a terminal, lines elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wmdd.runtime import log

logger = logging.getLogger(__name__)

Observer = Callable[[str, int, int, str], None]
"""Function called with title, finished steps, total steps and unit when work begins, continues and ends."""

_observers: list[Observer] = []
_bars: Progress | None = None


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Call an observer at every step of progress within the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def progress(
    title: str, total: int, unit: str, observed: bool = True, timed: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show the progress of one piece of work; yields ``advance(steps)``.  May be nested.

    Without a terminal, one line reports the begin and one line the end.

    Args:
        title: name of the work.
        total: number of steps.
        unit: what is counted, in the plural.
        observed: whether observers are called.  They write to the run folder, which may belong to another run until
            the dataset is known.
        timed: whether the last line says how long the work took.  False for work that alternates with other work.
    """
    if total == 0:
        yield lambda steps: None
        return
    begun = time.monotonic()
    done = 0

    def tell() -> None:
        for observer in _observers if observed else ():
            observer(title, done, total, unit)

    with _bar(title, total, unit) as move:

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            move(steps)
            tell()

        tell()
        yield advance
        tell()
    logger.info(f"{title}: {done:,} {unit}{f' in {time.monotonic() - begun:.1f} s' if timed else ''}")


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    global _bars
    barred = log.shows_progress()
    logger.log(logging.DEBUG if barred else logging.INFO, f"{title}: {total:,} {unit} ...")
    if not barred:
        yield lambda steps: None
        return
    outermost = _bars is None
    bars = _bars or Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=log.console,
        transient=True,
    )
    if outermost:
        _bars = bars
        bars.start()
    task = bars.add_task(title, total=total, unit=unit)
    try:
        yield lambda steps: bars.advance(task, steps)
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            _bars = None
