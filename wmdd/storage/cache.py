"""The content-addressed cache: runs, sweeps and protocols share its teachers, statistics, dataset listings and decoded
validation images.

An entry is a folder ``KIND/KEY``.  KEY is the digest of everything that the content depends on, so an entry is never
stale.  (The key of a listing depends on the dataset's folder; the listing is compared with that folder.)  The cache is
in the folder ``WMDD_CACHE``, by default in the user's cache folder.

Processes read a finished entry without a lock and without write access.  Its modification time records its last use.
The empty file ``pins/KIND-KEY`` says that a queued job will need the entry.
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
"""Suffix of entry names.  Entries of another version of the package have another suffix, or none."""
KINDS = ("teachers", "statistics", "listings", "images")


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the cache."""

    kind: str
    key: str
    path: Path
    size: int
    """Size in bytes"""
    used: float
    """Time of the last write or recorded use, in seconds since 1970"""
    pinned: bool
    """Whether a queued job needs the entry"""
    current: bool
    """Whether this version of the package uses the entry"""


def cache_root() -> Path:
    """Return the cache's folder: ``WMDD_CACHE``, else ``wmdd`` in the user's cache folder."""
    given = os.environ.get("WMDD_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wmdd"


def folder(kind: str, key: str) -> Path:
    """Return the folder of an entry.  The entry need not exist."""
    return cache_root() / kind / f"{key}{_SUFFIX}"


def prepare(path: Path) -> None:
    """Create a folder of the cache if it is absent, and check that it is writable.

    Raises:
        InputError: the cache is not writable; the message names ``WMDD_CACHE`` as the remedy.
    """
    reason = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            reason = "is not writable"
    except OSError as error:
        reason = f"cannot be created: {error.strerror}"
    if reason:
        raise InputError(f"{path}: {reason}; set WMDD_CACHE to a writable folder")


def note_use(path: Path) -> None:
    """Record the use of an entry, at most once a day.  A read-only cache records nothing."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY_SECONDS and os.access(path, os.W_OK):
            os.utime(path)


def pin(paths: Iterable[Path]) -> None:
    """Protect entries from ``prune`` for 30 days.  They need not exist yet.  A read-only cache has no pins."""
    for path in paths:
        with suppress(OSError):
            mark = _mark(path)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def entries(*kinds: str) -> list[CacheEntry]:
    """Return the entries of the given kinds (default: all).  The longest unused entry comes first."""
    found = []
    for kind in kinds or KINDS:
        for path in sorted((cache_root() / kind).glob("[!.]*")):
            stats = []
            for file in (path, *path.rglob("*")):
                with suppress(FileNotFoundError):  # another process has renamed its temporary file
                    stats.append(file.stat())
            size = sum(stat.st_size for stat in stats if S_ISREG(stat.st_mode))
            used = max((stat.st_mtime for stat in stats), default=0.0)
            pinned, current = _is_pinned(_mark(path)), path.suffix == _SUFFIX
            found.append(CacheEntry(kind, path.name.removesuffix(_SUFFIX), path, size, used, pinned, current))
    return sorted(found, key=lambda entry: entry.used)


def of_other_versions() -> int:
    """Return the number of entries of other versions of the package, which this version never uses."""
    return sum(not entry.current for entry in entries())


def prune(older_than_days: float) -> list[CacheEntry]:
    """Delete the entries that are not pinned and were unused for ``older_than_days`` days; return these entries."""
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
