"""What a person sees while work goes on: progress bars on a terminal, plain lines elsewhere."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


quiet = False
"""Set on ranks other than 0: they say nothing."""


@contextmanager
def quietly(wanted: bool) -> Iterator[None]:
    """Say nothing for the length of the block, if that is wanted."""
    global quiet
    before = quiet
    quiet = quiet or wanted
    try:
        yield
    finally:
        quiet = before


observers: list[Callable[[str, int, int, str], None]] = []
"""Called with (title, steps done, steps in all, unit) when a piece of work begins, goes on and ends."""


def say(message: str) -> None:
    """Print one line, without markup."""
    if not quiet:
        console.print(message, markup=False, soft_wrap=True)


_bars: Progress | None = None


@contextmanager
def progress(title: str, total: int, unit: str, observed: bool = True) -> Iterator[Callable[[int], None]]:
    """Show the progress of one piece of work; yields ``advance(steps)``.  May be nested.

    Without a terminal, one line says when it begins and one when it ends.  ``observed=False`` tells no observers: they
    write into the run folder, which may not be this run's before its data are known.
    """
    if quiet or total == 0:
        yield lambda steps: None
        return
    begun = time.monotonic()
    done = 0

    def tell() -> None:
        for observer in observers if observed else ():
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
    say(f"{title}: {done:,} {unit} in {time.monotonic() - begun:.1f} s")


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    global _bars
    if not console.is_terminal:
        say(f"{title}: {total:,} {unit} ...")
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
        console=console,
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
