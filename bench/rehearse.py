"""``wmdd bench rehearse``: how many ranks would share the groups of a run, and what their agreements cost.

Rehearsed ranks are threads of this process. They use the product's own queue of groups, heartbeats and agreements, on a
real key-value store; only the work of a group is replaced by a given time. That time passes on a virtual clock: it
advances to the next end of a group whenever every rank works. So the order in which groups are dealt is that of the
product, and a rehearsal of hours takes seconds.
"""

import heapq
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from bench.projection import size_of
from bench.rehearse_task import TaskCost
from bench.workloads import groups_of
from wmdd.config.schema import Config
from wmdd.errors import InputError
from wmdd.records.system import system
from wmdd.runs.class_partition import Group
from wmdd.runs.folder import RunFolder
from wmdd.runs.work_queue import WorkQueue
from wmdd.runtime.arithmetic import Hardware, resolve
from wmdd.runtime.heartbeats import Peers
from wmdd.runtime.job_store import allow_open_files, loopback_store
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.seeding import generator
from wmdd.runtime.team import Team
from wmdd.storage.files import write_json

AGREEMENTS = 5
"""Agreements that are timed."""
_FILES_OF_A_RANK = 6
"""Open files of a rehearsed rank: two clients with both of their ends, and two lock files."""
_WIRE_REQUESTS = {"get": 2, "multi_get": 2}
"""Requests that a method of torch's store sends, if not one: these two first wait for their keys."""


@dataclass(frozen=True)
class GroupTimes:
    """Given times of a group, in seconds of one rank."""

    synthesis: float
    """Synthesis of a whole group; a smaller group takes a proportional time"""
    statistics: float
    """Statistics of a whole group, which are measured one group ahead"""
    spread: float = 0.0
    """Relative standard deviation of the time of a group"""
    slow: float = 1.0
    """Factor of the times of the last rank"""


@dataclass(frozen=True)
class Rehearsal:
    """What a number of ranks did."""

    ranks: int
    groups: int
    seconds: float
    """Virtual seconds from the first group to the end of the last one"""
    busy: float
    """Share of the ranks' time in which they worked"""
    bound: float
    """Largest possible share with whole groups"""
    fewest_groups: int
    """Groups of the team with the fewest"""
    most_groups: int
    queue_requests: float
    """Store requests for each group that was dealt"""
    agreement_requests: float
    """Store requests of an agreement, on the rank with most"""
    agreement_seconds: float
    """Real seconds of an agreement, from the first rank's begin to the last rank's end; median"""
    heartbeat_requests: float
    """Store requests of heartbeats, of a rank in a second"""

    @property
    def of_bound(self) -> float:
        """Busy share relative to the largest possible one."""
        return self.busy / self.bound


def run(config: Config, ranks: Sequence[int], times: GroupTimes) -> list[Rehearsal]:
    """Rehearse the distillation of a run on each number of ranks.

    Args:
        config: config of the run. Its images are not read.
        ranks: numbers of ranks.
        times: given times of a group.

    Raises:
        InputError: the config is wrong, or ``synthesis.split_class`` does not divide a number of ranks.
    """
    classes, _ = size_of(config)
    groups = groups_of(config, classes)
    size = config.synthesis.split_class
    if uneven := [count for count in ranks if count % size]:
        raise InputError(f"--ranks {uneven[0]}: synthesis.split_class = {size} does not divide it")
    return [_rehearse(config, groups, count, times) for count in ranks]


class VirtualClock:
    """A clock that ranks share. It advances to the next end of a sleep whenever all ranks sleep.

    Args:
        ranks: number of ranks that are awake.
    """

    def __init__(self, ranks: int) -> None:
        self.now = 0.0
        self._awake = ranks
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, threading.Event]] = []

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass for the calling rank."""
        event = threading.Event()
        with self._lock:
            heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), event))
            self._fall_asleep()
        event.wait()

    def leave(self) -> None:
        """Let the clock advance without the calling rank."""
        with self._lock:
            self._fall_asleep()

    def _fall_asleep(self) -> None:
        self._awake -= 1
        if self._awake or not self._sleepers:
            return
        self.now = self._sleepers[0][0]
        while self._sleepers and self._sleepers[0][0] == self.now:
            self._awake += 1
            heapq.heappop(self._sleepers)[2].set()


class CountedStore:
    """A key-value store that counts the requests to it. Clients made by ``clone`` count for themselves."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = 0
        self.clones: list[CountedStore] = []

    def clone(self) -> "CountedStore":
        """Return another client of the same store."""
        self.clones.append(CountedStore(self._store.clone()))
        return self.clones[-1]

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self.requests += 0 if name == "set_timeout" else _WIRE_REQUESTS.get(name, 1)
            return method(*arguments)

        return call


@dataclass
class _Member:
    """One rehearsed rank."""

    store: CountedStore
    worked: float = 0.0
    """Virtual seconds of its work"""
    groups: int = 0
    queue_requests: int = 0
    agreement_requests: float = 0.0
    heartbeat_requests: float = 0.0
    """Requests of heartbeats in a second"""


def fewest_seconds(seconds: Sequence[float], teams: int, speeds: float) -> float:
    """Return a lower bound of the time in which teams can do indivisible pieces of work.

    Of the ``k · teams + 1`` longest pieces one team must do ``k + 1``.

    Args:
        seconds: time of each piece on a team of speed 1.
        teams: number of teams, none faster than 1.
        speeds: sum of the speeds of all teams.
    """
    longest = sorted(seconds, reverse=True)
    whole = [sum(longest[last - last // teams : last + 1]) for last in range(0, len(longest), teams)]
    return max(sum(longest) / speeds, *whole)


def _rehearse(config: Config, groups: Sequence[Group], size: int, times: GroupTimes) -> Rehearsal:
    teams = size // config.synthesis.split_class
    scale = _scales(groups, config.seed, times.spread)
    clock, line = VirtualClock(teams), threading.Barrier(size)
    moments: list[tuple[float, float]] = []
    arithmetic = resolve(config.compute.replace({"device": "cpu"}), Hardware("cpu", bf16=False))
    allow_open_files(_FILES_OF_A_RANK * size)
    server = loopback_store(0, 1, timedelta(minutes=5))
    members = [_Member(CountedStore(dist.PrefixStore("peers", server.clone()))) for _ in range(size)]
    with TemporaryDirectory(prefix="wmdd-rehearse-") as place:
        folder = RunFolder(Path(place))

        def lock_file(group: Group) -> Path:
            return folder.lock_file(f"group-{group.index:05d}")

        def rank(index: int) -> None:
            member = members[index]
            begun = time.perf_counter()
            with _peers(member.store, index, size) as peers:
                job = Ranks(index, size, torch.device("cpu"), arithmetic, peers)
                for _ in range(AGREEMENTS):
                    line.wait()
                    start, before = time.perf_counter(), member.store.requests
                    job.broadcast_from_main(list(range(len(groups))))
                    moments.append((start, time.perf_counter()))
                    member.agreement_requests = max(member.agreement_requests, member.store.requests - before)
                line.wait()
                before = member.store.requests
                if index < teams:
                    factor = times.slow if index == teams - 1 else 1.0
                    team = Team(index, teams, 0, 1)
                    queue = WorkQueue("groups", job, team, groups, lock_file, lambda _: False, lambda: False)
                    _work(queue, clock, member, {group: factor * scale[group] for group in groups}, times)
                    queue.close()
                member.queue_requests = member.store.requests - before
                job.barrier()
                (beats,) = member.store.clones
                member.heartbeat_requests = beats.requests / (time.perf_counter() - begun)

        _in_threads(size, rank)
    rounds = [moments[start : start + size] for start in range(0, len(moments), size)]
    seconds = [max(end for _, end in one) - min(begin for begin, _ in one) for one in rounds]
    work = [(times.statistics + times.synthesis) * scale[group] for group in groups]
    return _summary(members, work, teams, times.slow, clock.now, statistics.median(seconds))


@contextmanager
def _peers(store: CountedStore, rank: int, size: int) -> Iterator[Peers]:
    peers = Peers(store, rank, size, lambda: False)
    try:
        yield peers
    finally:
        peers.leave()


def _scales(groups: Sequence[Group], seed: int, spread: float) -> dict[Group, float]:
    """Return the time of each group, relative to that of a whole group without spread."""
    images = [_images(group) for group in groups]
    draws = torch.randn(len(groups), generator=generator(seed, "rehearse"), dtype=torch.float64).tolist()
    return {
        group: own / max(images) * max(0.1, 1 + spread * draw)
        for group, own, draw in zip(groups, images, draws, strict=True)
    }


def _images(group: Group) -> int:
    """Return the size of a group: its images, or its classes where it has all images of each."""
    return len(group.classes) * (group.images[1] - group.images[0] if group.images else 1)


def _work(
    queue: WorkQueue[Group], clock: VirtualClock, member: _Member, scale: Mapping[Group, float], times: GroupTimes
) -> None:
    """Do the groups that a team gets; its work lets virtual time pass."""

    def spend(seconds: float) -> None:
        member.worked += seconds
        clock.sleep(seconds)

    def measured(group: Group) -> Group:
        spend(times.statistics * scale[group])
        return group

    for position in queue.worked(measured, lambda group: spend(times.synthesis * scale[group])):
        member.groups += 1
        queue.release(position)
    clock.leave()


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    """Call ``work`` for each number below ``count``, all at once. The first failure ends the wait."""
    ends: SimpleQueue[BaseException | None] = SimpleQueue()

    def do(index: int) -> None:
        try:
            work(index)
            ends.put(None)
        except BaseException as error:
            ends.put(error)

    for index in range(count):
        threading.Thread(target=do, args=(index,), daemon=True).start()
    for _ in range(count):
        if error := ends.get():
            raise error


def _summary(
    members: Sequence[_Member],
    seconds: Sequence[float],
    teams: int,
    slow: float,
    end: float,
    agreement_seconds: float,
) -> Rehearsal:
    busy = sum(member.worked for member in members[:teams]) / (teams * end)
    dealt = [member.groups for member in members[:teams]]
    fewest = fewest_seconds(seconds, teams, teams - 1 + 1 / slow)
    return Rehearsal(
        ranks=len(members),
        groups=sum(dealt),
        seconds=end,
        busy=busy,
        bound=min(1.0, busy * end / fewest),
        fewest_groups=min(dealt),
        most_groups=max(dealt),
        queue_requests=sum(member.queue_requests for member in members) / len(seconds),
        agreement_requests=max(member.agreement_requests for member in members),
        agreement_seconds=agreement_seconds,
        heartbeat_requests=statistics.mean(member.heartbeat_requests for member in members),
    )


def tell(
    found: Sequence[Rehearsal], times: GroupTimes, task: TaskCost | None, out: Path | None, console: Console
) -> None:
    """Write the rehearsals, and that of a student task, to ``out`` as JSON, if given, and print them."""
    if out:
        facts = {"given": asdict(times), "system": system(cuda=False), "torch": torch.__version__}
        every = [asdict(one) | {"of_bound": one.of_bound} for one in found]
        write_json(out, {**facts, "rehearsals": every, "student_task": asdict(task) if task else None})
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("Ranks", "Groups", "Each", "At work", "Bound", "Of bound", "Requests", "Agreement", "Requests")
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for one in found:
        each = f"{one.fewest_groups}-{one.most_groups}" if one.fewest_groups < one.most_groups else f"{one.most_groups}"
        figures = (one.busy, one.bound, one.of_bound, one.queue_requests)
        shown.add_row(
            f"{one.ranks}",
            f"{one.groups}",
            each,
            *(f"{value:.3f}" for value in figures[:3]),
            f"{one.queue_requests:.2f}",
            f"{1000 * one.agreement_seconds:.0f} ms",
            f"{one.agreement_requests:.0f}",
        )
    console.print(shown)
    for line in [*NOTES, *([str(task)] if task else [])]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


NOTES = (
    "Each: groups of a team. At work: share of the ranks' time in which they work, in virtual time.",
    "Bound: largest possible share with whole groups. First requests: store requests for each dealt group.",
    f"Agreement: real time, all ranks in one process, median of {AGREEMENTS}. Last requests: of the rank with most.",
)
