"""The content-addressed store: teachers, statistics and listings of data sets that runs, sweeps and protocols share.

An entry is a folder ``KIND/KEY``; KEY is the digest of everything its content depends on, so an entry is never stale.
(The key of a listing is a place: it is compared with the folders there.)  The store lies below ``WMDD_CACHE``, by
default in the user's cache folder.

A finished entry is read without a lock and without write access. That it is in use is noted by its modification time.
``pins/KIND-KEY`` is an empty file: a submission that waits in a queue will need that entry.
"""

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from wmdd.errors import InputError
from wmdd.storage.files import FORMAT

_SUFFIX = f".v{FORMAT}"
"""Ends the names of entries: one of another version of the package has another end, or none."""
KINDS = ("teachers", "statistics", "listings")


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the store."""

    kind: str
    key: str
    path: Path
    size: int
    """Bytes"""
    used: float
    """When it was last written, or its use last noted: seconds since 1970"""
    pinned: bool
    """Whether a queued submission names it"""
    current: bool
    """Whether this version of the package uses it"""


def cache_root() -> Path:
    """Return the store's folder: ``WMDD_CACHE``, else ``wmdd`` in the user's cache folder."""
    given = os.environ.get("WMDD_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wmdd"


def folder(kind: str, key: str) -> Path:
    """Return the folder of an entry, which need not exist."""
    return cache_root() / kind / f"{key}{_SUFFIX}"


def prepare(path: Path) -> None:
    """Make a folder of the store if it is absent: something is to be written there.

    Raises:
        InputError: the store cannot be written; the message names ``WMDD_CACHE`` as the remedy.
    """
    reason = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            reason = "cannot be written"
    except OSError as error:
        reason = f"cannot be made: {error.strerror}"
    if reason:
        raise InputError(f"{path}: {reason}; set WMDD_CACHE to a folder of yours")


def note_use(path: Path) -> None:
    """Note that an entry is in use: at most once a day, and never in a store that cannot be written."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY_SECONDS and os.access(path, os.W_OK):
            os.utime(path)


def pin(paths: Iterable[Path]) -> None:
    """Keep ``prune`` away from entries, which need not exist yet, for 30 days; a store that cannot be written has none
    pinned."""
    for path in paths:
        with suppress(OSError):
            mark = _mark(path)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def entries(*kinds: str) -> list[CacheEntry]:
    """List the store, or entries of some kinds, the longest unused first."""
    found = []
    for kind in kinds or KINDS:
        for path in sorted((cache_root() / kind).glob("[!.]*")):
            stats = []
            for file in (path, *path.rglob("*")):
                with suppress(FileNotFoundError):  # a temporary file of a process at work
                    stats.append(file.stat())
            size = sum(stat.st_size for stat in stats if S_ISREG(stat.st_mode))
            used = max((stat.st_mtime for stat in stats), default=0.0)
            pinned, current = _is_pinned(_mark(path)), path.suffix == _SUFFIX
            found.append(CacheEntry(kind, path.name.removesuffix(_SUFFIX), path, size, used, pinned, current))
    return sorted(found, key=lambda entry: entry.used)


def of_other_versions() -> int:
    """Return the number of entries that another version of the package wrote, and this one never uses."""
    return sum(not entry.current for entry in entries())


def prune(older_than_days: float) -> list[CacheEntry]:
    """Delete the entries that were not used for so many days and are not pinned; return them."""
    old = [
        entry for entry in entries() if time.time() - entry.used > older_than_days * _DAY_SECONDS and not entry.pinned
    ]
    for entry in old:
        shutil.rmtree(entry.path)
    for mark in (cache_root() / "pins").glob("*"):
        if not _is_pinned(mark):
            mark.unlink(missing_ok=True)
    return old


_DAY_SECONDS = 86400.0
_PINNED_DAYS = 30


def _mark(path: Path) -> Path:
    return cache_root() / "pins" / f"{path.parent.name}-{path.name}"


def _is_pinned(mark: Path) -> bool:
    try:
        return time.time() - mark.stat().st_mtime < _PINNED_DAYS * _DAY_SECONDS
    except OSError:
        return False
