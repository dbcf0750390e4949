"""Ranks, devices and random numbers that do not depend on how the work is spread."""

import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wmdd.arithmetic import Arithmetic, applied, hardware_of, resolve
from wmdd.config import Compute
from wmdd.console import say
from wmdd.errors import InputError, Interrupted, WmddError, tell
from wmdd.placement import Placement, choose_device, placement_of
from wmdd.roll import PeerLost, Roll, describe

_PATIENCE = timedelta(minutes=10)
"""How long ranks wait for each other when they meet, and in a collective: long waits are meetings in the roll."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Team:
    """Ranks that work on one thing together (a student, a class), among ``count`` teams of the job."""

    index: int
    """Which team"""
    count: int
    rank: int
    """This process within its team"""
    size: int
    group: Any = None
    """Process group; None for a team of one"""

    def deal(self, items: Sequence[T]) -> list[T]:
        """Return this team's items: every ``count``-th one."""
        return list(items[self.index :: self.count])

    def own(self, start: int, stop: int) -> slice:
        """Return this rank's rows of a batch that reaches from ``start`` to ``stop``: every ``size``-th one."""
        return slice(start + self.rank, stop, self.size)

    def shard(self, rows: Tensor) -> Tensor:
        """Return this rank's rows."""
        return rows[self.own(0, len(rows))] if self.size > 1 else rows

    def wrap(self, network: nn.Module, example: Tensor) -> nn.Module:
        """Return the network under DistributedDataParallel when the team has more than one rank.

        DDP averages over ranks: a loss summed over this rank's rows, times ``size / rows of the batch``, is the mean.

        Args:
            network: on its device, in training mode.
            example: two or more inputs of it, on the same device; their values do not matter.
        """
        if self.size == 1:
            return network
        parallel = nn.parallel.DistributedDataParallel(network, process_group=self.group)
        if self.size > 2:
            # DDP lays gradients out anew after its first backward pass, and where they lie decides in which order more
            # than two ranks add them.  A pass ahead of all updates makes a resumed training round like any other.
            before = [buffer.clone() for buffer in network.buffers()]
            with torch.random.fork_rng([example.device] if example.device.type == "cuda" else []):
                parallel(example).sum().backward()
            for buffer, value in zip(network.buffers(), before, strict=True):
                buffer.copy_(value)
            network.zero_grad(set_to_none=True)
        return parallel

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the team, the same on every rank.  Its gradient is the local one: all ranks hold the
        same loss, and each wants the derivative by its own part."""
        return _TeamSum.apply(values, self.group) if self.size > 1 else values

    def anyone(self, *flags: bool) -> list[bool]:
        """Return for each flag whether a rank of the team has raised it, the same on every rank."""
        return [count > 0 for count in self.sum(torch.tensor([float(flag) for flag in flags])).tolist()]

    def alike(self, value: float) -> bool:
        """Return whether all ranks of the team hold the same number, the same answer on every rank."""
        return len({float(one) for one in self.gather(torch.tensor(value, dtype=torch.float64))}) == 1

    def together(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; if a rank was asked to stop in it, all ranks leave here.

        For work that has no common positions at which ranks could agree, such as decoding.

        Raises:
            Interrupted: ``work`` raised it on a rank of the team.
        """
        try:
            done = work()
        except Interrupted:
            self.anyone(True)
            raise
        if any(self.anyone(False)):
            raise Interrupted("stopped, as another rank was")
        return done

    def share_buffers(self, network: nn.Module) -> None:
        """Give every rank the buffers of the team's first rank, so that all hold one network.

        DistributedDataParallel does so before each forward pass; after the last one each rank has BatchNorm
        statistics of its own images.
        """
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, group=self.group, group_src=0)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks of the team, which must be of one shape, in the order of the ranks."""
        if self.size == 1:
            return [values]
        # Contiguous like what is sent: a receiver in another layout would hold permuted values.
        found = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(found, values.contiguous(), group=self.group)
        return found


class _TeamSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


ALONE = Team(0, 1, 0, 1)
"""The team of a process that works by itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job: ``rank`` of ``size``, with its device and arithmetic."""

    rank: int
    size: int
    device: torch.device
    arithmetic: Arithmetic
    """The same on all ranks of the job"""
    roll: Roll | None = None
    """Of the job's ranks; None when there is one"""
    _groups: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """``fp32``, ``tf32`` or ``bf16``."""
        return self.arithmetic.precision

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes what is shared."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks; free when there is one.

        Raises:
            PeerLost: another rank is gone; the message names it.
            Interrupted: a stop was asked for while waiting.
        """
        self.agree(None)

    def agree(self, value: T) -> T:
        """Return rank 0's value (anything JSON holds) on every rank, so that all take the same decision.

        Raises:
            PeerLost: another rank is gone; the message names it.
            Interrupted: a stop was asked for while waiting.
        """
        return value if self.roll is None else self.roll.agree(value)

    def team(self, size: int, key: str) -> Team:
        """Return this rank's team when the job is cut into teams of ``size`` consecutive ranks; all ranks must ask.

        Args:
            size: ranks of a team.
            key: of the config, for the message.

        Raises:
            InputError: the number of ranks is no multiple of ``size``.
        """
        if self.size % size:
            raise InputError(
                f"{key} = {size}: the job has {self.size} ranks, which is no multiple; start it with torchrun"
                f" --nproc-per-node {size}, or set {key}=1"
            )
        if size > 1 and size not in self._groups:
            self._groups[size] = [
                dist.new_group(list(range(i, i + size)), _PATIENCE) for i in range(0, self.size, size)
            ]
        index, rank = divmod(self.rank, size)
        return Team(index, self.size // size, rank, size, self._groups[size][index] if size > 1 else None)

    def autocast(self) -> torch.autocast:
        """Return the context under which networks run: bf16 autocast, or nothing at other precisions."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, function: F) -> F:
        """Return a function or network for a loop that calls it with few shapes, compiled if the config asks for it.

        Each shape is compiled for itself: with sizes as variables it would be slower for all.
        """
        return torch.compile(function, dynamic=False) if self.arithmetic.compile else function  # type: ignore[return-value]


@contextmanager
def ranks(compute: Compute, stop: Callable[[], bool] = lambda: False, here: Placement | None = None) -> Iterator[Ranks]:
    """Join the job that torchrun or srun started (or stand alone), with threads and arithmetic from the config.

    Torch's threads, switches, current device and random numbers are afterwards as they were.  In a job of several
    ranks an error is printed before the job is left, which may take seconds.

    Args:
        compute: device, threads, precision.
        stop: whether this process was asked to stop; looked at while it waits for other ranks.
        here: where this process stands; by default what its environment says.

    Raises:
        InputError: the device does not exist here, lacks a precision, or computes otherwise than that of another rank.
        PeerLost: another rank is gone.
        WmddError: the other ranks do not come, or memory is short.
    """
    here = here or placement_of(os.environ)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(choose_device(compute.device, here, visible))
    with _settings(compute, device):
        arithmetic = resolve(compute, hardware_of(device))
        with (
            applied(arithmetic),
            _joined(here, device, stop) if here.size > 1 else nullcontext() as roll,
            within_memory(device),
        ):
            job = Ranks(here.rank, here.size, device, arithmetic, roll)
            _refuse_unlike(job)
            yield job


@contextmanager
def _settings(compute: Compute, device: torch.device) -> Iterator[None]:
    """Set torch's threads and current device, and give all back as it was, the random numbers too."""
    gpus = [device] if device.type == "cuda" else []
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if gpus:
            # Before anything else is asked of CUDA: a question would go to GPU 0, and open a context there.
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
    """Let torch.compile make a graph for each shape, objective and network of a process.

    By default the ninth, and what follows it, runs eager without a word.

    Raises:
        WmddError: there are more than ``_GRAPHS``.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    limits = {"recompile_limit": _GRAPHS, "accumulated_recompile_limit": _GRAPHS, "fail_on_recompile_limit_hit": True}
    try:
        with config.patch(limits):
            yield
    except FailOnRecompileLimitHit as error:
        raise WmddError(
            f"compute.compile = true: one process made {_GRAPHS} graphs of one step; do fewer runs in a process, or set"
            " compute.compile=false"
        ) from error


_GRAPHS = 256


@contextmanager
def _joined(here: Placement, device: torch.device, stop: Callable[[], bool]) -> Iterator[Roll]:
    """Meet the other ranks of the job, and leave them so that none waits for this one."""
    if here.by_srun and here.rank == 0:
        say(f"one run on the {here.size} tasks that srun started, which meet at {here.meeting}")
    try:
        store, *_ = next(dist.rendezvous(here.meeting, here.rank, here.size, timeout=_PATIENCE))
        dist.init_process_group(store=store, rank=here.rank, world_size=here.size, **_group_options(device))
    except (dist.DistError, TimeoutError) as error:
        # NCCL says what is wrong in its last line, others in their first.
        told = str(error).rpartition("Last error:\n")[2].partition("\n")[0]
        raise WmddError(f"rank {here.rank} of {here.size}: the ranks do not meet ({here.meeting}): {told}") from error
    roll = Roll(dist.PrefixStore("roll", store), here.rank, here.size, stop)
    failure: BaseException | None = None
    try:
        yield roll
    except BaseException as error:
        failure = error
        # A collective that broke, or a launcher that ends all ranks because it lost one: say which.
        if isinstance(error, RuntimeError | Interrupted) and (gone := roll.missing()):
            failure = PeerLost(f"rank {here.rank} of {here.size}: {describe(gone)}; start the same command again")
            tell(failure)
            raise failure from error
        if isinstance(error, WmddError):
            tell(error)
        raise
    finally:
        roll.leave(stopped=isinstance(failure, Interrupted))
        if _aborts(device.type, failed=failure is not None):
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _group_options(device: torch.device) -> dict[str, Any]:
    """Return how the process groups of a job are made, for ranks that work on such a device."""
    if device.type == "cuda":
        # Tensors on the CPU go through gloo.  Bound to its device, NCCL connects now and refuses two ranks on one GPU.
        return {"backend": "cpu:gloo,cuda:nccl", "timeout": _PATIENCE, "device_id": device}
    return {"backend": "gloo", "timeout": _PATIENCE}


def _aborts(device_type: str, failed: bool) -> bool:
    """Return whether the groups are aborted and not destroyed.

    Destroying waits for pending collectives of NCCL; after a failure one may wait for a rank that is gone.
    """
    return failed and device_type == "cuda"


@contextmanager
def within_memory(device: torch.device, remedy: str = "use smaller batches or groups") -> Iterator[None]:
    """Turn a lack of memory into one line with the peak and what to do.

    Args:
        device: where the work runs.
        remedy: names the config key to change.

    Raises:
        WmddError: an allocation failed on the device or on the CPU.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        where = _short_of_memory(error, device)
        if where is None:
            raise
        raise WmddError(f"out of memory on {where}, with a peak of {_peak(where)}; {remedy}") from error


def _short_of_memory(error: BaseException, device: torch.device) -> torch.device | None:
    """Return which device an error says is out of memory; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return device
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return torch.device("cpu")
    return None


def _peak(device: torch.device) -> str:
    """Return the most memory that this process has held there, and what the device has."""
    if device.type == "cuda":
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{peak / 1e9:.1f} GB of {whole / 1e9:.1f} GB"


def _refuse_unlike(job: Ranks) -> None:
    """Refuse ranks of two arithmetics, on every rank.

    Raises:
        InputError: ``compute`` means different things to two ranks.
    """
    if job.size == 1:
        return
    own = json.dumps(job.arithmetic.facts).encode()
    sent = torch.zeros(256, dtype=torch.uint8)
    sent[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    everyone = Team(0, 1, job.rank, job.size)
    found = [Arithmetic(**json.loads(bytes(one.tolist()).rstrip(b"\0"))) for one in everyone.gather(sent)]
    for rank, other in enumerate(found):
        if other != found[0]:
            raise InputError(
                f"the ranks compute differently: rank 0 in {found[0]}, rank {rank} in {other}; use nodes of one kind,"
                f" or set {found[0].keys_unlike(other)}"
            )


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from names and numbers, such as ``seed_of(config.seed, "start", class_name)``.

    Seeds hang on what is computed (a class, a group, an iteration), never on who computes it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by ``seed_of``: the same numbers whatever device uses them."""
    return torch.Generator().manual_seed(seed_of(*parts))
