"""The content-addressed store: teachers and statistics that runs, sweeps and protocols share.

An entry is a folder ``KIND/KEY``; KEY is the digest of everything its content depends on, so an entry is never stale.
It lies below ``WMDD_CACHE``, by default in the user's cache folder.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from wmdd.errors import InputError

KINDS = ("teachers", "statistics", "listings")


@dataclass(frozen=True)
class Entry:
    """One folder of the store: its kind, key, size in bytes and the time it was last changed (seconds since 1970)."""

    kind: str
    key: str
    path: Path
    size: int
    changed: float


def cache_root() -> Path:
    """Return the store's folder: ``WMDD_CACHE``, else ``wmdd`` in the user's cache folder."""
    given = os.environ.get("WMDD_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wmdd"


def folder(kind: str, key: str) -> Path:
    """Return the folder of an entry, made if absent.

    Raises:
        InputError: the store cannot be written; the message names ``WMDD_CACHE`` as the remedy.
    """
    path = cache_root() / kind / key
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}; set WMDD_CACHE to a folder of yours") from None
    return path


def entries() -> list[Entry]:
    """List the store, oldest first."""
    found = []
    for kind in KINDS:
        for path in sorted((cache_root() / kind).glob("*")):
            files = [file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
            changed = max((stat.st_mtime for stat in files), default=path.stat().st_mtime)
            found.append(Entry(kind, path.stem, path, sum(stat.st_size for stat in files), changed))
    return sorted(found, key=lambda entry: entry.changed)


def prune(older_than_days: float) -> list[Entry]:
    """Delete the entries that were not changed for so many days; return them."""
    old = [entry for entry in entries() if time.time() - entry.changed > older_than_days * 86400]
    for entry in old:
        shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
    return old
