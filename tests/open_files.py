"""Counts the files and folders that a piece of work opens."""

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_opened: list[str] = []
_watching = False


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(os.path.abspath(os.fspath(arguments[0])) if isinstance(arguments[0], str | Path) else "")


@functools.cache
def _install() -> None:
    sys.addaudithook(_note)  # a hook cannot be removed


@contextmanager
def files_opened(*roots: Path) -> Iterator[Counter[Path]]:
    """Count how often each file or folder below some folders is opened, by Python."""
    global _watching
    found: Counter[Path] = Counter()
    _install()
    _opened.clear()
    _watching = True
    try:
        yield found
    finally:
        _watching = False
        found.update(path for path in map(Path, _opened) if any(path.is_relative_to(root) for root in roots))
