"""Heartbeats and agreement among the ranks of a job.

Ranks meet in the job's key-value store instead of a collective.  A collective cannot name a missing rank, and a stop
request cannot interrupt it.  Each rank writes a heartbeat to the key-value store.  A rank counts as gone when its
heartbeat has stopped, or when it has left for another reason than a stop request.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from wmdd.errors import Interrupted, WmddError

_HEARTBEAT_SECONDS = 0.5
"""Seconds between two heartbeats."""
_LOST_AFTER_SECONDS = 30.0
"""Seconds without a heartbeat after which a rank counts as gone."""
_LOST_AFTER_SECONDS_ON_STOP = 5.0
"""The same after a stop request: a launcher that has lost one rank also stops the others."""
_STOPPED = "stopped"
"""Value written by a rank that leaves because of a stop request."""


class PeerLost(WmddError):
    """Another rank of the job is gone."""


class Peers:
    """Communication of this rank with the other ranks of the job.

    Args:
        store: key-value store of the job (``torch.distributed``).
        rank: rank of this process.
        size: number of ranks.
        stop: returns whether this process was asked to stop.
    """

    def __init__(self, store: Any, rank: int, size: int, stop: Callable[[], bool]) -> None:
        self._store, self._rank, self._size, self._stop = store, rank, size, stop
        self._turns = itertools.count()
        self._left = threading.Event()
        self._beat(store, 0)
        # A separate client: a waiting request of the main thread would delay the heartbeat.
        self._thread = threading.Thread(target=self._keep_beating, args=(store.clone(),), daemon=True)
        self._thread.start()

    def broadcast_from_main(self, value: Any) -> Any:
        """Wait for all ranks, and return rank 0's value (any JSON value).

        Raises:
            PeerLost: a rank is gone; the message names the rank.
            Interrupted: this rank was asked to stop while it waited, and no rank is gone.
        """
        turn = next(self._turns)
        try:
            if self._rank == 0:
                self._store.set(f"value/{turn}", json.dumps(value))
            self._store.add(f"here/{turn}", 1)
            watch = _Watch(self._store, self._rank, self._size)
            pause = 0.001
            while self._store.add(f"here/{turn}", 0) < self._size:
                gone = watch.gone(_LOST_AFTER_SECONDS)
                if (gone or watch.stopped) and self._store.add(f"here/{turn}", 0) == self._size:
                    break  # the rank has left after this meeting
                gone = self._verdict(gone)
                if not gone and self._stop():
                    gone = self.missing()
                    if not gone:
                        raise Interrupted("stopped while waiting for the other ranks")
                if gone:
                    raise PeerLost(f"rank {self._rank} of {self._size}: {describe(gone)}; start the same command again")
                if watch.stopped:
                    raise Interrupted("stopped because another rank was stopped")
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            return json.loads(self._store.get(f"value/{turn}"))
        except RuntimeError as error:
            host = "the rank that hosts the job's key-value store is gone"
            raise PeerLost(f"rank {self._rank} of {self._size}: {host}") from error

    def ticket(self, queue: str) -> int:
        """Return the next number of a queue, from 0.  Each number goes to only one rank of the job.

        Raises:
            PeerLost: the rank that hosts the job's key-value store is gone.
        """
        try:
            return int(self._store.add(f"queue/{queue}", 1)) - 1
        except RuntimeError as error:
            host = "the rank that hosts the job's key-value store is gone"
            raise PeerLost(f"rank {self._rank} of {self._size}: {host}") from error

    def missing(self) -> list[int]:
        """Watch the heartbeats for a few seconds, and return the ranks that are gone."""
        watch = _Watch(self._store, self._rank, self._size)
        deadline = time.monotonic() + _LOST_AFTER_SECONDS_ON_STOP + 2 * _HEARTBEAT_SECONDS
        gone: list[int] = []
        try:
            while not gone and time.monotonic() < deadline:
                time.sleep(_HEARTBEAT_SECONDS)
                gone = watch.gone(_LOST_AFTER_SECONDS_ON_STOP)
            return self._verdict(gone)
        except RuntimeError:
            return [0]

    def _verdict(self, gone: list[int]) -> list[int]:
        """Return the ranks that the first rank to notice a loss has found gone.

        All ranks thus name the cause, and not the rank that noticed it and left.
        """
        if not gone:
            return []
        found: list[int] = json.loads(self._store.compare_set("gone", "", json.dumps(gone)))
        return found

    def leave(self, stopped: bool = False) -> None:
        """Announce that this rank comes to no further meeting, and end the heartbeat.

        Ranks stop at different times after a stop request: a rank that has stopped does not count as gone.
        """
        self._left.set()
        self._thread.join(timeout=2 * _HEARTBEAT_SECONDS)
        try:
            self._store.set(f"left/{self._rank}", _STOPPED if stopped else "")
            if self._rank == 0:  # rank 0 may host the key-value store: wait until the others have left
                everyone = [f"left/{rank}" for rank in range(self._size)]
                self._store.wait(
                    everyone, timedelta(seconds=_LOST_AFTER_SECONDS if stopped else _LOST_AFTER_SECONDS_ON_STOP)
                )
        except RuntimeError:
            pass  # the key-value store ended with another rank

    def _keep_beating(self, store: Any) -> None:
        for count in itertools.count(1):
            if self._left.wait(_HEARTBEAT_SECONDS):
                return
            try:
                self._beat(store, count)
            except RuntimeError:
                return  # the key-value store is gone; the next meeting raises the error

    def _beat(self, store: Any, count: int) -> None:
        store.set(f"beat/{self._rank}", str(count))


class _Watch:
    """Records when each rank's heartbeat last changed, by this rank's clock."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store = store
        self._others = [other for other in range(size) if other != rank]
        self._beats: dict[int, bytes] = {}
        self._changed: dict[int, float] = {}
        self._looked = -_HEARTBEAT_SECONDS
        self.stopped = False
        """Whether a rank has left because of a stop request"""

    def gone(self, patience: float) -> list[int]:
        """Return the ranks that have left, or whose heartbeat has not changed for ``patience`` seconds."""
        now = time.monotonic()
        if now - self._looked < _HEARTBEAT_SECONDS:
            return []
        self._looked = now
        found = []
        for rank in self._others:
            left = self._store.get(f"left/{rank}") if self._store.check([f"left/{rank}"]) else None
            if left == _STOPPED.encode():
                self.stopped = True
                continue
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            if self._beats.get(rank) != beat:
                self._beats[rank], self._changed[rank] = beat, now
            if now - self._changed[rank] > patience or left is not None:
                found.append(rank)
        return found


def describe(ranks: list[int]) -> str:
    """Return ``rank 1 is gone`` or ``ranks 1 and 3 are gone``."""
    named = " and ".join(map(str, ranks))
    return f"rank {named} is gone" if len(ranks) == 1 else f"ranks {named} are gone"
