"""The queue of missing work: each free team of ranks takes the next item, and no process waits for another."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from filelock import BaseFileLock

from wmdd.errors import Interrupted
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.team import Team
from wmdd.storage.files import try_lock

_POLL_SECONDS = 0.5
"""Seconds between two checks of items that another process holds."""
_END, _WAIT = -1, -2
"""Values that the first rank of a team sends to the others instead of the position of an item."""

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


class WorkQueue(Generic[Item]):
    """Hands a team the missing items of a run (groups, students), one at a time.

    A counter in the job's key-value store deals the items to the teams of the job, so a fast team takes more items than
    a slow one. A lock on each item makes other processes of the same run folder take other items. An item that another
    process holds comes last, and is skipped once that process has finished it. All ranks of a team must call ``next``
    together.

    Args:
        name: name of the queue, which is used once in a job.
        ranks: ranks of the job.
        team: this rank's team.
        items: missing items, in the order in which they are handed out; the same on every rank.
        lock_file: returns the lock file of an item.
        is_done: returns whether any process has finished an item since.
        stop: whether to stop.
    """

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        team: Team,
        items: Sequence[Item],
        lock_file: Callable[[Item], Path],
        is_done: Callable[[Item], bool],
        stop: Callable[[], bool],
    ) -> None:
        self._team, self._items, self._lock_file, self._is_done, self._stop = team, items, lock_file, is_done, stop
        self._fresh = itertools.takewhile(lambda ticket: ticket < len(items), ranks.tickets(name))
        self._held_elsewhere: list[int] = []
        self._locks: dict[int, BaseFileLock] = {}
        self._left = len(items)
        self._begun: tuple[int, Any] | None = None
        self._claim: Callable[[], tuple[int, Any] | None] | None = None

    @property
    def ahead(self) -> bool:
        """Whether to take the next item before the current one is done; False if an idle team could take it."""
        return self._left >= self._team.count

    def next(self, wait: bool = True) -> tuple[int, Item] | None:
        """Return the next item, which this process now holds, with its position; or None when all items are done.

        Args:
            wait: whether to wait for items that other processes hold. A process that holds an unfinished item must not
                wait: two such processes would wait for each other.

        Raises:
            Interrupted: a stop was requested.
        """
        while True:
            position = self._take() if self._team.rank == 0 else 0
            flags = torch.tensor([float(position), float(self._stop())], dtype=torch.float64)
            position, stopping = (int(value) for value in self._team.sum(flags).tolist())
            if stopping:
                raise Interrupted("stopped before the next piece of work")
            if position == _END or (position == _WAIT and not wait):
                return None
            if position != _WAIT:
                self._left = min(self._left, len(self._items) - position - 1)
                return position, self._items[position]
            time.sleep(_POLL_SECONDS)

    def worked(
        self,
        prepare: Callable[[Any], Prepared],
        work: Callable[[Prepared], object],
        begin: Callable[[Item], Any] = lambda item: item,
    ) -> Iterator[int]:
        """Prepare and do the items that this team gets; yield the position of each item that is done.

        The next item is prepared before the current one is done, unless an idle team could take it. At most two
        prepared items are held. ``work`` may call ``begin_ahead``.

        Args:
            prepare: returns what ``work`` needs, from the result of ``begin``.
            work: does an item.
            begin: starts the preparation of an item in the background; by default it returns the item.

        Raises:
            Interrupted: a stop was requested.
        """

        def claim(wait: bool) -> tuple[int, Any] | None:
            claimed = self.next(wait)
            return None if claimed is None else (claimed[0], begin(claimed[1]))

        def prepared(begun: tuple[int, Any] | None) -> tuple[int, Prepared] | None:
            return None if begun is None else (begun[0], prepare(begun[1]))

        ready = prepared(claim(wait=True))
        while ready:
            if any(self._team.anyone(self._stop())):
                raise Interrupted(f"stopped before piece {ready[0] + 1} of {len(self._items)} of the work")
            begun, self._begun = self._begun, None
            if begun is None and self.ahead:
                begun = claim(wait=False)  # others may wait for ``ready``
            following = prepared(begun)
            self._claim = partial(claim, False) if following else None
            work(ready[1])
            yield ready[0]
            # The current item is released before the item after ``following`` is prepared.
            ready = following or prepared(claim(wait=True))

    def begin_ahead(self) -> None:
        """Begin the item after the next one, if many are left: a slow team should not hold many of the last items."""
        if self._claim and self._begun is None and self._left >= 3 * self._team.count:
            self._begun = self._claim()

    def release(self, position: int) -> None:
        """Release the lock of a finished item."""
        if lock := self._locks.pop(position, None):
            lock.release()

    def close(self) -> None:
        """Release all items that this process holds."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    def _take(self) -> int:
        """Return the position of an item that this process has locked, or ``_END`` or ``_WAIT``."""
        for position in self._fresh:
            if self._lock(position):
                return position
        for position in list(self._held_elsewhere):
            self._held_elsewhere.remove(position)
            if self._lock(position):
                return position
        return _WAIT if self._held_elsewhere else _END

    def _lock(self, position: int) -> bool:
        """Lock an item; return whether this process holds the lock and the item is still missing."""
        item = self._items[position]
        lock = try_lock(self._lock_file(item))
        if lock is None:
            self._held_elsewhere.append(position)
            return False
        if self._is_done(item):
            lock.release()
            return False
        self._locks[position] = lock
        return True
