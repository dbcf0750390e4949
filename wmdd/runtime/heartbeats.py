"""Heartbeats and agreement among the ranks of a job.

Ranks meet in the job's key-value store instead of a collective.  A collective cannot name a missing rank, and a stop
request cannot interrupt it.

- **Agreement.**  Each rank writes its own value.  Rank 0 waits for all values, decides, and writes the outcome.  The
  others wait for the outcome.  An agreement costs a rank at most three requests to the store, however long it waits.
  A rank that gives up writes another outcome: a stop request, or the ranks that are gone.  The first outcome counts.
- **Heartbeats.**  Each rank writes its state twice a second.  Rank 0 reads all states by one ``multi_get``, also while
  it computes, and writes a notice.  The others read this notice and the state of rank 0.
"""

import hashlib
import hmac
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

from wmdd.errors import Interrupted, WmddError

_HEARTBEAT_SECONDS = 0.5
"""Seconds between two heartbeats."""
_LOST_AFTER_SECONDS = 30.0
"""Seconds without a heartbeat after which a rank counts as gone."""
_LOST_AFTER_SECONDS_ON_STOP = 5.0
"""The same after a stop request: a launcher that has lost one rank also stops the others."""
_START_SECONDS = 600.0
"""Seconds that a rank may take until its first heartbeat."""
_SUSPENDED_SECONDS = 5.0
"""Seconds between two looks after which this process was suspended: the patience with all ranks starts again."""
_POLL_SECONDS = 0.2
"""Seconds between two checks of stop request and notice during a wait.  A check costs no request."""
_FOREVER = timedelta(days=365)
_LEFT, _STOPPED = b"left", b"stopped"
"""States of a rank that comes to no further meeting; the second one after a stop request."""

T = TypeVar("T")


class PeerLost(WmddError):
    """Another rank of the job is gone."""


@dataclass(frozen=True)
class _Notice:
    """What rank 0 has noticed about the ranks."""

    gone: tuple[int, ...] = ()
    """Ranks that have left, or were silent for ``_LOST_AFTER_SECONDS``"""
    silent: tuple[int, ...] = ()
    """Ranks that have left, or were silent for ``_LOST_AFTER_SECONDS_ON_STOP``"""
    stopped: int | None = None
    """A rank that has left because of a stop request"""


class Peers:
    """Communication of this rank with the other ranks of the job.

    Args:
        store: key-value store of the job (``torch.distributed``), for this object alone.
        rank: rank of this process.
        size: number of ranks.
        stop: returns whether this process was asked to stop.
        secret: word that only the ranks of the job know.  It signs outcomes and notices.

    Raises:
        RuntimeError: rank 0 does not come within the timeout of the store.
    """

    def __init__(self, store: Any, rank: int, size: int, stop: Callable[[], bool], secret: str = "") -> None:
        self._store, self._rank, self._size, self._stop = store, rank, size, stop
        self._seal = _Seal(secret)
        # A separate client: a waiting request would delay the heartbeat.
        self._beats = store.clone()
        store.set_timeout(_FOREVER)
        self._states = [f"state/{other}" for other in range(size)]
        self._turns = itertools.count()
        self._notice = _Notice()
        self._watch = _Watch([0] if rank else range(1, size))
        self._failure: BaseException | None = None
        self._silent_store = False
        self._left = threading.Event()
        if rank == 0:
            # Every key that a heartbeat reads must exist: a request for a missing key waits.
            self._beats.multi_set([*self._states, "notice"], [""] * size + [self._sealed_notice()])
        else:
            self._beats.wait(["notice"])
        self._beat(0)
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def broadcast_from_main(self, value: Any) -> Any:
        """Wait for all ranks, and return rank 0's value (any JSON value).

        Raises:
            PeerLost: a rank is gone; the message names the rank.
            Interrupted: this rank or another one was asked to stop.
        """
        return self.agree(None, lambda _: value)

    def agree(self, own: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Return what rank 0 decides about the values of all ranks, the same on every rank.

        Args:
            own: value of this rank (any JSON value).
            decide: returns the decision (any JSON value) for the values in the order of the ranks.  Only rank 0 calls
                it, in another thread.

        Raises:
            PeerLost: a rank is gone; the message names the rank.
            Interrupted: this rank or another one was asked to stop.
        """
        turn = next(self._turns)
        outcome, values = f"outcome/{turn}", [f"value/{turn}/{rank}" for rank in range(self._size)]

        def main() -> bytes:
            texts = self._store.multi_get(values[1:])
            found = [self._seal.open(key, text) for key, text in zip(values[1:], texts, strict=True)]
            decision = self._seal.close(outcome, {"value": decide([own, *found])})
            text: bytes = self._store.compare_set(outcome, "", decision)
            return text

        def other() -> bytes:
            self._store.set(values[self._rank], self._seal.close(values[self._rank], own))
            text: bytes = self._store.get(outcome)
            return text

        def give_up() -> bytes | None:
            """Return the outcome after trouble, which may be that all ranks have met; None without trouble."""
            if self._notice.gone:
                trouble: dict[str, Any] = {"gone": self._first_verdict(self._notice.gone)}
            elif self._stop():
                trouble = {"stopped": self._rank}
            elif self._notice.stopped is not None:
                trouble = {"stopped": self._notice.stopped}
            else:
                return None
            text = self._ask(lambda: self._beats.compare_set(outcome, "", self._seal.close(outcome, trouble)))
            if self._rank == 0:  # end the request that waits for them
                self._ask(lambda: self._beats.multi_set(values, [self._seal.close(key, None) for key in values]))
            return bytes(text)

        found = self._seal.open(outcome, self._ask(main if self._rank == 0 else other, give_up))
        if "gone" in found:
            raise self._lost(describe(found["gone"]) + "; start the same command again")
        if "stopped" in found:
            own_request = found["stopped"] == self._rank and self._stop()
            why = "while waiting for the other ranks" if own_request else "because another rank was stopped"
            raise Interrupted(f"stopped {why}")
        return found["value"]

    def ticket(self, queue: str) -> int:
        """Return the next number of a queue, from 0.  Each number goes to only one rank of the job.

        Raises:
            PeerLost: the rank that hosts the job's key-value store is gone.
        """
        return int(self._ask(lambda: self._store.add(f"queue/{queue}", 1))) - 1

    def missing(self) -> list[int]:
        """Watch the heartbeats for a few seconds, and return the ranks that are gone."""
        deadline = time.monotonic() + _LOST_AFTER_SECONDS_ON_STOP + 2 * _HEARTBEAT_SECONDS
        try:
            while time.monotonic() < deadline:
                time.sleep(_HEARTBEAT_SECONDS)
                if gone := self._notice.silent:
                    return self._first_verdict(gone)
                if self._failure or self._silent_store:
                    break
            else:
                return []
        except PeerLost:
            pass
        return [] if self._notice.stopped == 0 else [0]

    def leave(self, stopped: bool = False) -> None:
        """Announce that this rank comes to no further meeting, and end the heartbeat.

        Ranks stop at different times after a stop request: a rank that has stopped does not count as gone.
        """
        self._left.set()
        self._thread.join(timeout=4 * _HEARTBEAT_SECONDS)
        if self._silent_store or self._thread.is_alive():
            return  # another request would wait for ever
        try:
            self._beats.set(self._states[self._rank], (_STOPPED if stopped else _LEFT).decode())
            if self._rank == 0:
                self._see_off(_LOST_AFTER_SECONDS if stopped else _LOST_AFTER_SECONDS_ON_STOP)
        except RuntimeError:
            pass  # the key-value store ended with another rank

    def _see_off(self, seconds: float) -> None:
        """Watch the others until they have left: rank 0 may host the key-value store."""
        deadline, pause = time.monotonic() + seconds, 0.01
        while time.monotonic() < deadline:
            self._look()
            if not self._watch.present(_LOST_AFTER_SECONDS_ON_STOP):
                return
            time.sleep(pause)
            pause = min(2 * pause, _HEARTBEAT_SECONDS)

    def _keep_beating(self) -> None:
        for count in itertools.count(1):
            if self._left.wait(_HEARTBEAT_SECONDS):
                return
            try:
                self._beat(count)
            except (RuntimeError, WmddError) as error:
                self._failure = error  # the next request of the main thread raises it
                return

    def _beat(self, count: int) -> None:
        self._beats.set(self._states[self._rank], str(count))
        self._look()

    def _look(self) -> None:
        """Read the states: rank 0 those of all ranks, the others that of rank 0 and its notice."""
        if self._rank == 0:
            self._watch.note(self._beats.multi_get(self._states[1:]))
            notice = self._watch.notice()
            if notice != self._notice:
                self._notice = notice
                self._beats.set("notice", self._sealed_notice())
            return
        state, text = self._beats.multi_get([self._states[0], "notice"])
        self._watch.note([state])
        published, own = self._seal.open("notice", text), self._watch.notice()
        self._notice = _Notice(
            tuple(published["gone"]) or own.gone,
            tuple(published["silent"]) or own.silent,
            own.stopped if published["stopped"] is None else published["stopped"],
        )

    def _sealed_notice(self) -> str:
        return self._seal.close("notice", asdict(self._notice))

    def _first_verdict(self, gone: Sequence[int]) -> list[int]:
        """Return the ranks that the first rank to notice a loss has found gone.

        All ranks thus name the cause, and not the rank that noticed it and left.
        """
        text = self._seal.close("gone", list(gone))
        found: list[int] = self._seal.open("gone", self._ask(lambda: self._beats.compare_set("gone", "", text)))
        return found

    def _ask(self, request: Callable[[], T], give_up: Callable[[], T | None] = lambda: None) -> T:
        """Return the answer of the store to a request, which may wait for long.

        The request runs in a thread, so that signals reach this rank.  Other requests of this object go through the
        client of the heartbeat meanwhile.

        Args:
            request: asks the store.
            give_up: called during the wait; its first answer that is not None ends the wait.

        Raises:
            PeerLost: the rank that hosts the store is gone, or the store does not answer.
        """
        answers: list[T] = []
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(request())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_POLL_SECONDS)
        begun = seen = time.monotonic()
        while thread.is_alive():
            now = time.monotonic()
            begun, seen = (now if now - seen > _SUSPENDED_SECONDS else begun), now
            if now - max(self._watch.looked, begun) > _LOST_AFTER_SECONDS:
                self._silent_store = True
                raise self._lost(_NO_HOST)
            answer = give_up()
            if answer is not None:
                thread.join(_POLL_SECONDS)
                return answer
            thread.join(_POLL_SECONDS)
        if failures:
            if isinstance(failures[0], RuntimeError):
                raise self._lost(_NO_HOST) from failures[0]
            raise failures[0]
        return answers[0]

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(f"rank {self._rank} of {self._size}: {what}")


_NO_HOST = "the rank that hosts the job's key-value store is gone"


class _Watch:
    """Records when the state of each watched rank last changed, by this rank's clock.

    Args:
        ranks: watched ranks.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.looked = time.monotonic()
        """Time of the last look"""
        self._states = dict.fromkeys(ranks, b"")
        self._changed = dict.fromkeys(ranks, self.looked)

    def note(self, states: Sequence[bytes]) -> None:
        """Take note of the states of the watched ranks, in their order."""
        now = time.monotonic()
        resumed = now - self.looked > _SUSPENDED_SECONDS
        for rank, state in zip(self._states, states, strict=True):
            if resumed or state != self._states[rank]:
                self._states[rank], self._changed[rank] = state, now
        self.looked = now

    def notice(self) -> _Notice:
        """Return what the last look showed."""
        stopped = next((rank for rank, state in self._states.items() if state == _STOPPED), None)
        return _Notice(tuple(self._gone(_LOST_AFTER_SECONDS)), tuple(self._gone(_LOST_AFTER_SECONDS_ON_STOP)), stopped)

    def present(self, patience: float) -> list[int]:
        """Return the ranks that have not left and were not silent for ``patience`` seconds."""
        away = {rank for rank, state in self._states.items() if state in (_LEFT, _STOPPED)}
        return sorted(set(self._states) - away - set(self._gone(patience)))

    def _gone(self, patience: float) -> list[int]:
        """Return the ranks that have left, or whose state has not changed for ``patience`` seconds."""
        found = []
        for rank, state in self._states.items():
            silent = self.looked - self._changed[rank]
            if state == _LEFT or (state != _STOPPED and silent > (patience if state else _START_SECONDS)):
                found.append(rank)
        return found


class _Seal:
    """Signs the values of a job by HMAC-SHA-256 with a secret word and the name of their key.

    Without the secret nobody can write an outcome that the ranks accept.  The name of a key is no secret, because the
    store lists all keys to any client.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def close(self, key: str, value: Any) -> str:
        """Return a JSON value as signed text."""
        text = json.dumps(value)
        return self._signature(key, text) + text

    def open(self, key: str, sealed: bytes) -> Any:
        """Return the value of a signed text.

        Raises:
            WmddError: the signature is wrong.
        """
        text = sealed.decode(errors="replace")
        signature, text = text[:_SIGNATURE_LENGTH], text[_SIGNATURE_LENGTH:]
        if not hmac.compare_digest(signature.encode(), self._signature(key, text).encode()):
            raise WmddError(
                f"the job's key-value store has a value of {key!r} that no rank of this job wrote; set the same"
                " WMDD_JOB_SECRET for all ranks, and start the same command again"
            )
        return json.loads(text)

    def _signature(self, key: str, text: str) -> str:
        return hmac.new(self._secret, f"{key}\n{text}".encode(), hashlib.sha256).hexdigest()


_SIGNATURE_LENGTH = 64


def describe(ranks: Sequence[int]) -> str:
    """Return ``rank 1 is gone`` or ``ranks 1 and 3 are gone``."""
    named = " and ".join(map(str, ranks))
    return f"rank {named} is gone" if len(ranks) == 1 else f"ranks {named} are gone"
