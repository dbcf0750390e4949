"""Creates the listing of a dataset once for all processes, and reuses it while the dataset's folders are unchanged.

The listings of a tree are in the cache, in ``listings/KEY``.  KEY is the digest of the tree's real root and format.  A
newer listing is a separate file with a higher number, so that processes keep the older file that they have mapped.  A
listing contains the time of the last change of every folder read.  While these times are the same, no file is checked
again, except faulty files: users repair them in place.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import __version__ as pillow_version

from wmdd.data.listing import (
    ABSENT,
    DECODED,
    LISTED,
    VERSION,
    Fault,
    ListedCatalogue,
    Listing,
    Part,
    Rows,
    open_listing,
    rows_of,
)
from wmdd.data.sources import SPLITS, Look, Members, Split, Tree, changed
from wmdd.errors import Interrupted, WmddError
from wmdd.runtime import signals
from wmdd.runtime.progress_bars import progress
from wmdd.storage import cache
from wmdd.storage.files import digest, locked

_LISTING_THREADS = 8
"""Threads that list folders and check files; they mostly wait for the disk."""
_CLASSES_AT_A_TIME = 64
"""Number of classes that are listed together."""
_FILES_PER_CHUNK = 256
"""Files or folders that a thread processes at a time."""
_LISTINGS_KEPT = 16
"""Number of listings kept for one root: nodes with different local datasets at one path have one listing each."""

Class = dict[Split, Rows]
Verdicts = Callable[[ListedCatalogue, Split, Sequence[int]], Mapping[int, Mapping[int, str]]]
"""Function that decodes all images of some classes of a split, and returns the errors by class and row."""


def obtain(tree: Tree, classes: Sequence[str], verdicts: Verdicts | None = None, refresh: bool = False) -> Path:
    """Return the file of a listing that covers the current state of these classes; list what is missing.

    A finished listing needs neither a lock nor write access.

    Args:
        tree: tree of image files.
        classes: names of the classes to list.
        verdicts: function that decodes every image; None: images are listed without decoding.
        refresh: whether to list these classes again in any case.

    Raises:
        InputError: a class has no images, or the cache is not writable.
        Interrupted: a stop was requested; finished listings are kept.
    """
    key = digest([VERSION, os.path.realpath(tree.root), tree.format])
    known = tree.classes("train")
    folder = cache.folder("listings", key)
    if not refresh and (found := _current(folder, tree, known, classes, verdicts is not None)):
        cache.note_use(folder)
        return found
    cache.prepare(folder)
    with locked(folder / ".lock", signals.requested):
        if not refresh and (found := _current(folder, tree, known, classes, verdicts is not None)):
            return found  # another process has created it meanwhile
        return _make(folder, tree, known, classes, verdicts, refresh)


def _files(folder: Path) -> list[Path]:
    """Return the listing files of a root, newest first."""
    return sorted(folder.glob("[0-9]*.safetensors"), reverse=True)


def _opened(paths: Iterable[Path]) -> Iterator[Listing]:
    """Yield the listings that are not damaged."""
    for path in paths:
        try:
            yield open_listing(path)
        except WmddError:
            continue  # it will be created again


def _current(folder: Path, tree: Tree, known: Sequence[str], classes: Sequence[str], decoded: bool) -> Path | None:
    """Return the newest listing that is complete for these classes, or None."""
    look = _Glance(tree.root)
    for listing in _opened(_files(folder)):
        if listing.classes == tuple(known) and not _stale(listing, classes, look, decoded):
            return listing.path
    return None


class _Glance:
    """Times of the last change of folders; each folder is checked only once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, int] = {}

    def at(self, names: Iterable[str]) -> Mapping[str, int]:
        """Return the time of the last change of each folder."""
        missing = [name for name in dict.fromkeys(names) if name not in self._seen]
        chunks = [missing[start : start + _FILES_PER_CHUNK] for start in range(0, len(missing), _FILES_PER_CHUNK)]
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            for chunk, found in zip(chunks, pool.map(self._look, chunks), strict=True):
                self._seen.update(zip(chunk, found, strict=True))
        return self._seen

    def _look(self, names: Sequence[str]) -> list[int]:
        root = str(self._root)
        return [changed(f"{root}/{name}") for name in names]

    def same(self, name: str, fault: Fault) -> bool:
        """Return whether a faulty file is unchanged."""
        try:
            stat = os.stat(self._root / name)
        except OSError:
            return fault.changed == 0
        return (fault.size, fault.changed) == (stat.st_size, stat.st_mtime_ns)


def _stale(listing: Listing, classes: Sequence[str], look: _Glance, decoded: bool) -> list[str]:
    """Return the classes that must be listed (or decoded) again."""
    folders: dict[str, list[tuple[str, int]]] = {}
    stale = set()
    if decoded and listing.facts.get("decoder") != pillow_version:
        return list(classes)
    for label in classes:
        index = listing.places.get(label)
        states = [ABSENT if index is None else int(part.states[index]) for part in listing.parts.values()]
        if index is None or min(states) < (DECODED if decoded else LISTED):
            stale.add(label)
            continue
        folders[label] = [folder for part in listing.parts.values() for folder in part.folders_of(index)]
        for part in listing.parts.values():
            for row, fault in part.faults.get(index, {}).items():
                if not look.same(part.name(index, row), fault):
                    stale.add(label)
    now = look.at(name for found in folders.values() for name, _ in found)
    # A time of 0 is unreliable: the folder had just changed when it was listed.
    stale |= {label for label, found in folders.items() if any(then == 0 or now[name] != then for name, then in found)}
    return [label for label in classes if label in stale]


def _make(
    folder: Path, tree: Tree, known: Sequence[str], classes: Sequence[str], verdicts: Verdicts | None, refresh: bool
) -> Path:
    """List the missing classes, and write them together with the known classes."""
    old = next(_opened(_files(folder)), Listing((), {split: Part.from_classes([]) for split in SPLITS}))
    todo = list(classes) if refresh else _stale(old, classes, _Glance(tree.root), False)
    fresh: dict[str, Class] = {}
    try:
        with progress(f"listing {tree.root}", len(todo), "classes", observed=False) as advance:
            for label, rows in _listed(tree, todo):
                fresh[label] = rows
                advance(1)
    except WmddError:
        if fresh:  # the next attempt continues from these classes
            _write(folder, _joined(old, known, fresh))
        raise
    listing = _joined(old, known, fresh)
    if verdicts is not None:
        path = _write(folder, listing) if fresh else None  # keeps the listing if a stop interrupts decoding
        listing = _decoded(ListedCatalogue(tree, listing), classes, verdicts)
        if path:
            path.unlink()  # no process has seen this file: the lock is held
    return _write(folder, listing)


def _joined(old: Listing, known: Sequence[str], fresh: Mapping[str, Class]) -> Listing:
    """Return the listing of all known classes: fresh ones, and the others from an older listing."""
    classes = [fresh.get(label) or old.rows(label) for label in known]
    if old.facts.get("decoder") != pillow_version:
        classes = [{split: _undecided(rows) for split, rows in each.items()} for each in classes]
    parts = {split: Part.from_classes([each[split] for each in classes]) for split in SPLITS}
    return Listing(tuple(known), parts, {"decoder": pillow_version})


def _undecided(rows: Rows) -> Rows:
    """Return rows without the results of decoding."""
    faults = {row: fault for row, fault in rows.faults.items() if not fault.decoded}
    return replace(rows, faults=faults, state=min(rows.state, LISTED))


def _listed(tree: Tree, classes: Sequence[str]) -> Iterator[tuple[str, Class]]:
    """List classes and check each of their images."""

    def members(pair: tuple[str, Split]) -> Members:
        _heed()
        return tree.members(pair[1], pair[0])

    def looks(names: Sequence[str]) -> list[Look]:
        _heed()
        return [tree.look(name) for name in names]

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        for start in range(0, len(classes), _CLASSES_AT_A_TIME):
            pairs = [(label, split) for label in classes[start : start + _CLASSES_AT_A_TIME] for split in SPLITS]
            found = list(pool.map(members, pairs))
            names = [f"{one.folders[0][0]}/{name}" for one in found for name in one.names]
            chunks = [names[first : first + _FILES_PER_CHUNK] for first in range(0, len(names), _FILES_PER_CHUNK)]
            seen = iter([look for chunk in pool.map(looks, chunks) for look in chunk])
            rows = iter([rows_of(one, list(islice(seen, len(one.names)))) for one in found])
            for label in classes[start : start + _CLASSES_AT_A_TIME]:
                yield label, {split: next(rows) for split in SPLITS}


def _heed() -> None:
    if signals.requested():
        raise Interrupted("stopped while images were listed; listed classes are kept")


def _decoded(listed: ListedCatalogue, classes: Sequence[str], verdicts: Verdicts) -> Listing:
    """Return a listing with the decoding results of all images of these classes."""
    listing = listed.listing
    parts = {}
    for split, part in listing.parts.items():
        every = [part.rows(index) for index in range(len(listing.classes))]
        todo = [listing.places[label] for label in classes if part.states[listing.places[label]] < DECODED]
        found = verdicts(listed, split, todo)
        for index in todo:
            faults = dict(every[index].faults)
            for row, reason in found.get(index, {}).items():
                stat = os.stat(listed.where(split, index, row))
                faults[row] = Fault(reason, True, stat.st_size, stat.st_mtime_ns)
            every[index] = replace(every[index], faults=faults, state=DECODED)
        parts[split] = Part.from_classes(every)
    return Listing(listing.classes, parts, listing.facts)


def _write(folder: Path, listing: Listing) -> Path:
    """Write a listing with the next number; delete the oldest ones."""
    older = _files(folder)
    number = int(older[0].name.partition("-")[0]) + 1 if older else 0
    content = hashlib.sha256()
    for part in listing.parts.values():
        content.update(part.digests.tobytes() + part.changed.tobytes())
    path = folder / f"{number:08d}-{content.hexdigest()[:12]}.safetensors"
    listing.write(path)
    for stale in older[_LISTINGS_KEPT - 1 :]:
        stale.unlink(missing_ok=True)
    return path
