"""The ranks of a job, with their device and arithmetic."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from wmdd.config.schema import ComputeConfig
from wmdd.errors import InputError, Interrupted, WmddError, tell
from wmdd.runtime.arithmetic import Arithmetic, applied, hardware_of, resolve
from wmdd.runtime.heartbeats import PeerLost, Peers, describe
from wmdd.runtime.job_store import open_store, secret_of
from wmdd.runtime.memory import within_memory
from wmdd.runtime.placement import Placement, choose_device, placement_of
from wmdd.runtime.team import T, Team

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=10)
"""Maximum wait at the start of the job and in a collective.  Longer waits use ``Peers``."""


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Ranks:
    """This process in its job: rank ``rank`` of ``size``, with its device and arithmetic."""

    rank: int
    size: int
    device: torch.device
    arithmetic: Arithmetic
    """Arithmetic, the same on all ranks of the job"""
    peers: Peers | None = None
    """Communication with the other ranks; None when there is only one rank"""
    groups: "ProcessGroups | None" = None
    """Process groups of teams; None when there is only one rank"""

    @property
    def precision(self) -> str:
        """``fp32``, ``tf32`` or ``bf16``."""
        return self.arithmetic.precision

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes the shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks.  It costs nothing when there is only one rank.

        Raises:
            PeerLost: another rank is gone; the message names the rank.
            Interrupted: a stop was requested during the wait.
        """
        self.broadcast_from_main(None)

    def broadcast_from_main(self, value: T) -> T:
        """Return rank 0's value (any JSON value) on every rank, so that all ranks take the same decision.

        Raises:
            PeerLost: another rank is gone; the message names the rank.
            Interrupted: a stop was requested during the wait.
        """
        return value if self.peers is None else self.peers.broadcast_from_main(value)

    def tickets(self, queue: str) -> Iterator[int]:
        """Yield numbers of a queue without end: each number goes to one rank of the job, lower ones first.

        Args:
            queue: name of the queue; a name is used once in a job.
        """
        for own in itertools.count():
            yield own if self.peers is None else self.peers.ticket(queue)

    def team(self, size: int, key: str) -> Team:
        """Return this rank's team when the job is divided into teams of ``size`` consecutive ranks; all ranks must call
        it.

        Args:
            size: number of ranks of a team.
            key: config key of the size, for the error message.

        Raises:
            InputError: ``size`` does not divide the number of ranks.
        """
        if self.size % size:
            raise InputError(
                f"{key} = {size} does not divide the job's {self.size} ranks; start it with torchrun"
                f" --nproc-per-node {size}, or set {key}=1"
            )
        group = None
        if size > 1 and self.groups is not None:
            self.barrier()  # names a rank that is gone, and waits without a time limit
            group = self.groups.of_team(size)
        index, rank = divmod(self.rank, size)
        return Team(index, self.size // size, rank, size, group)

    def autocast(self) -> torch.autocast:
        """Return the context for networks: bf16 autocast, or a context without effect at other precisions."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, function: F) -> F:
        """Return a function or network, compiled if the config sets ``compute.compile``.

        It is compiled once per input shape: dynamic shapes would be slower.  So call it with few shapes.
        """
        return torch.compile(function, dynamic=False) if self.arithmetic.compile else function  # type: ignore[return-value]


@contextmanager
def ranks(
    compute: ComputeConfig, stop: Callable[[], bool] = lambda: False, here: Placement | None = None
) -> Iterator[Ranks]:
    """Join the job that torchrun or srun has started (or work alone), with threads and arithmetic from the config.

    Afterwards torch's threads, switches, current device and random state are restored.  In a job of several ranks an
    error is printed before this rank leaves the job, because leaving may take seconds.

    Args:
        compute: device, threads and precision.
        stop: returns whether this process was asked to stop; checked during waits for other ranks.
        here: placement of this process; None: from its environment.

    Raises:
        InputError: the device does not exist, lacks the precision, or computes differently from another rank's.
        PeerLost: another rank is gone.
        WmddError: the other ranks do not come, or memory is exhausted.
    """
    here = here or placement_of(os.environ)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(choose_device(compute.device, here, visible))
    with _settings(compute, device):
        arithmetic = resolve(compute, hardware_of(device))
        with (
            applied(arithmetic),
            _joined(here, device, stop) if here.size > 1 else nullcontext((None, None)) as (peers, groups),
            within_memory(device),
        ):
            job = Ranks(here.rank, here.size, device, arithmetic, peers, groups)
            _refuse_unlike(job)
            yield job


@contextmanager
def _settings(compute: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Set torch's threads and current device; restore both and the random state afterwards."""
    gpus = [device] if device.type == "cuda" else []
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if gpus:
            # Before any other CUDA call: it would go to GPU 0, and create a context there.
            try:
                stack.enter_context(torch.cuda.device(device))
                torch.zeros(1, device=device)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise WmddError(f"{device} on {os.uname().nodename} does not work: {reason}") from error
        stack.enter_context(torch.random.fork_rng(gpus))
        if compute.compile:
            stack.enter_context(_many_graphs())
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(compute.threads)
        yield


@contextmanager
def _many_graphs() -> Iterator[None]:
    """Let torch.compile create a graph for each shape, objective and network of a process.

    By default torch silently runs the ninth graph and all later ones without compilation.

    Raises:
        WmddError: a process needs more than ``_MAX_GRAPHS`` graphs.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    limits = {
        "recompile_limit": _MAX_GRAPHS,
        "accumulated_recompile_limit": _MAX_GRAPHS,
        "fail_on_recompile_limit_hit": True,
    }
    try:
        with config.patch(limits):
            yield
    except FailOnRecompileLimitHit as error:
        raise WmddError(
            f"compute.compile = true: one process compiled {_MAX_GRAPHS} graphs of one step; do fewer runs per process,"
            " or set compute.compile=false"
        ) from error


_MAX_GRAPHS = 256


@contextmanager
def _joined(here: Placement, device: torch.device, stop: Callable[[], bool]) -> Iterator[tuple[Peers, "ProcessGroups"]]:
    """Meet the other ranks of the job.  At the end leave the job, so that no rank waits for this one."""
    if here.by_srun and here.rank == 0:
        logger.info(f"one run on the {here.size} tasks that srun started, which meet at {here.meeting}")
    with _meeting(here):
        store = open_store(here, os.environ, _PATIENCE)
        groups = ProcessGroups(store.clone(), here, device)
        peers = Peers(dist.PrefixStore("peers", store), here.rank, here.size, stop, secret_of(os.environ))
    failure: BaseException | None = None
    try:
        yield peers, groups
    except BaseException as error:
        failure = error
        # A lost rank breaks collectives, or makes the launcher stop all ranks.  Name the lost rank.
        if isinstance(error, RuntimeError | Interrupted) and (gone := peers.missing()):
            failure = PeerLost(f"rank {here.rank} of {here.size}: {describe(gone)}; start the same command again")
            tell(failure)
            raise failure from error
        if isinstance(error, WmddError):
            tell(error)
        raise
    finally:
        peers.leave(stopped=isinstance(failure, Interrupted))
        groups.close(failed=failure is not None)


@contextmanager
def _meeting(here: Placement) -> Iterator[None]:
    """Turn a failure to meet the other ranks into one line.

    Raises:
        WmddError: the ranks do not meet.
    """
    try:
        yield
    except (dist.DistError, OSError) as error:
        # NCCL gives the cause in its last line, other backends in their first.
        cause = str(error).rpartition("Last error:\n")[2].partition("\n")[0]
        raise WmddError(f"rank {here.rank} of {here.size}: the ranks do not meet ({here.meeting}): {cause}") from error


class ProcessGroups:
    """Process groups (gloo, NCCL) of the teams of a job.  None exists before the first team of several ranks.

    Args:
        store: key-value store of the job, for these groups alone.
        here: placement of this process.
        device: device of this rank.
    """

    def __init__(self, store: dist.Store, here: Placement, device: torch.device) -> None:
        self._store, self._here, self._device = store, here, device
        self._groups: dict[int, Any] = {}
        self._begun = False

    def of_team(self, size: int) -> Any:
        """Return the process group of this rank's team of ``size`` consecutive ranks; all ranks must call it.

        Raises:
            WmddError: the ranks do not meet.
        """
        here = self._here
        if size not in self._groups:
            with _meeting(here):
                if not self._begun:
                    self._begun = True
                    options = _group_options(self._device)
                    dist.init_process_group(store=self._store, rank=here.rank, world_size=here.size, **options)
                first = here.rank - here.rank % size
                own = list(range(first, first + size))
                self._groups[size] = dist.new_group(own, _PATIENCE, use_local_synchronization=True)
        return self._groups[size]

    def close(self, failed: bool) -> None:
        """Destroy the process groups.

        Args:
            failed: whether this rank leaves because of an error.
        """
        if not self._begun or not dist.is_initialized():
            return
        if _aborts(self._device.type, failed):
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _group_options(device: torch.device) -> dict[str, Any]:
    """Return the options of the job's process groups, for ranks on this kind of device."""
    if device.type == "cuda":
        # gloo transfers CPU tensors.  With device_id NCCL connects at once, and refuses two ranks on one GPU.
        return {"backend": "cpu:gloo,cuda:nccl", "timeout": _PATIENCE, "device_id": device}
    return {"backend": "gloo", "timeout": _PATIENCE}


def _aborts(device_type: str, failed: bool) -> bool:
    """Return whether to abort the process groups instead of destroying them.

    Destroying waits for pending NCCL collectives; after a failure such a collective may wait for a lost rank.
    """
    return failed and device_type == "cuda"


def _refuse_unlike(job: Ranks) -> None:
    """Refuse a job whose ranks differ in their arithmetic.  Every rank raises the error.

    Raises:
        InputError: two ranks have different arithmetics.
    """
    if job.peers is None:
        return

    def first_unlike(found: list[dict[str, Any]]) -> list[Any]:
        """Return the first rank that differs from rank 0, with its arithmetic and that of rank 0."""
        rank = next((rank for rank, facts in enumerate(found) if facts != found[0]), 0)
        return [rank, found[rank], found[0]]

    rank, *both = job.peers.agree(job.arithmetic.facts, first_unlike)
    if rank:
        other, main = (Arithmetic(**facts) for facts in both)
        raise InputError(
            f"the ranks compute differently: rank 0 in {main}, rank {rank} in {other}; use nodes of one kind,"
            f" or set {main.keys_unlike(other)}"
        )
