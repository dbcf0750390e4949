"""The queue of missing groups: each free team of ranks takes the next one, and no process waits for another."""

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from filelock import BaseFileLock

from wmdd.errors import Interrupted
from wmdd.runs.folder import RunFolder
from wmdd.runs.partition import Group
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.team import Team
from wmdd.storage.files import try_lock

_POLL_SECONDS = 0.5
"""Time between two looks at groups that another process holds."""
_END, _WAIT = -1, -2
"""What the first rank of a team tells the others instead of the position of a group."""


class GroupQueue:
    """Hands a team the missing groups of a run, one at a time.

    A counter in the job's store deals the groups to the teams of the job, so a fast team takes more groups than a slow
    one. A lock on each group keeps other processes of the same run folder away: they take other groups. A group that
    another process holds comes last, and is skipped once that process has finished it. All ranks of a team must ask
    together.

    Args:
        folder: run folder.
        ranks: ranks of the job.
        team: this rank's team.
        groups: missing groups, in the order in which they are handed out; the same on every rank.
        is_done: whether a group has been finished since, by any process.
        stop: whether to stop.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        team: Team,
        groups: Sequence[Group],
        is_done: Callable[[Group], bool],
        stop: Callable[[], bool],
    ) -> None:
        self._folder, self._team, self._groups, self._is_done, self._stop = folder, team, groups, is_done, stop
        tickets = ranks.tickets(f"groups of {folder.path}")
        self._fresh = itertools.takewhile(lambda ticket: ticket < len(groups), tickets)
        self._held_elsewhere: list[int] = []
        self._locks: dict[int, BaseFileLock] = {}
        self._left = len(groups)

    @property
    def ahead(self) -> bool:
        """Whether to take a group before the present one is done: not where an idle team could take it."""
        return self._left >= self._team.count

    def next(self) -> Group | None:
        """Return the next group, which this process now holds, or None when all groups are done.

        Raises:
            Interrupted: a stop was requested.
        """
        while True:
            position = self._take() if self._team.rank == 0 else 0
            flags = torch.tensor([float(position), float(self._stop())], dtype=torch.float64)
            position, stopping = (int(value) for value in self._team.sum(flags).tolist())
            if stopping:
                self.close()
                raise Interrupted("stopped between two groups")
            if position == _END:
                return None
            if position != _WAIT:
                self._left = min(self._left, len(self._groups) - position - 1)
                return self._groups[position]
            time.sleep(_POLL_SECONDS)

    def release(self, group: Group) -> None:
        """Let other processes have a group, which is finished."""
        if lock := self._locks.pop(group.index, None):
            lock.release()

    def close(self) -> None:
        """Release all groups that this process holds."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    def _take(self) -> int:
        """Return the position of a group that this process has locked, or ``_END`` or ``_WAIT``."""
        for position in self._fresh:
            if self._lock(position):
                return position
        for position in list(self._held_elsewhere):
            self._held_elsewhere.remove(position)
            if self._lock(position):
                return position
        return _WAIT if self._held_elsewhere else _END

    def _lock(self, position: int) -> bool:
        """Lock a group; return whether this process holds it and it is still missing."""
        group = self._groups[position]
        lock = try_lock(self._folder.lock_file(f"group-{group.index:05d}"))
        if lock is None:
            self._held_elsewhere.append(position)
            return False
        if self._is_done(group):
            lock.release()
            return False
        self._locks[group.index] = lock
        return True
