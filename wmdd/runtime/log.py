"""What a person sees while work goes on: progress bars on a terminal, plain lines elsewhere."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

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
