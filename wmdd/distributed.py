"""Ranks, devices and random numbers that do not depend on how the work is spread."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wmdd.config import Compute
from wmdd.errors import InputError, Interrupted
from wmdd.roll import PeerLost, Roll, describe

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

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network under DistributedDataParallel when the team has more than one rank.

        DDP averages over ranks: a loss summed over this rank's rows, times ``size / rows of the batch``, is the mean.
        """
        if self.size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network, process_group=self.group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the team, the same on every rank.  Its gradient is the local one: all ranks hold the
        same loss, and each wants the derivative by its own part."""
        return _TeamSum.apply(values, self.group) if self.size > 1 else values

    def anyone(self, *flags: bool) -> list[bool]:
        """Return for each flag whether a rank of the team has raised it, the same on every rank."""
        return [count > 0 for count in self.sum(torch.tensor([float(flag) for flag in flags])).tolist()]

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks of the team, which must be of one shape, in the order of the ranks."""
        if self.size == 1:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.size)]
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
    precision: str
    """``fp32`` or ``bf16``, resolved for this device."""
    compiles: bool = False
    """Whether ``compiled`` goes through torch.compile"""
    roll: Roll | None = None
    """Of the job's ranks; None when there is one"""
    _groups: dict[int, list[Any]] = field(default_factory=dict)

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
            self._groups[size] = [dist.new_group(list(range(i, i + size))) for i in range(0, self.size, size)]
        index, rank = divmod(self.rank, size)
        return Team(index, self.size // size, rank, size, self._groups[size][index] if size > 1 else None)

    def autocast(self) -> torch.autocast:
        """Return the context under which networks run: bf16 autocast, or nothing at fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, function: F) -> F:
        """Return a function or network for a loop that calls it with few shapes, compiled if the config asks for it.

        Each shape is compiled for itself: with sizes as variables it would be slower for all.
        """
        return torch.compile(function, dynamic=False) if self.compiles else function  # type: ignore[return-value]


@contextmanager
def ranks(compute: Compute, stop: Callable[[], bool] = lambda: False) -> Iterator[Ranks]:
    """Join the job that torchrun or srun started (or stand alone), with threads and precision from the config.

    Args:
        compute: device, threads, precision.
        stop: whether this process was asked to stop; looked at while it waits for other ranks.

    Raises:
        InputError: the device does not exist here.
        PeerLost: another rank is gone.
    """
    rank, size, local = (int(os.environ.get(key, default)) for key, default in _JOB)
    device = _device(compute.device, local)
    precision = _precision(compute.precision, device)
    torch.set_num_threads(compute.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield Ranks(rank, size, device, precision, compute.compile)
        return
    store, *_ = next(dist.rendezvous("env://", rank, size, timeout=_JOINING))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    roll = Roll(dist.PrefixStore("roll", store), rank, size, stop)
    stopped = False
    try:
        yield Ranks(rank, size, device, precision, compute.compile, roll)
    except (RuntimeError, Interrupted) as error:
        # A collective that broke, or a launcher that ends all ranks because it lost one: say which.
        if gone := roll.missing():
            raise PeerLost(
                f"rank {rank} of {size}: {describe(gone)} ({error}); start the same command again"
            ) from error
        stopped = isinstance(error, Interrupted)
        raise
    finally:
        roll.leave(stopped)
        dist.destroy_process_group()


_JOB = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
_JOINING = timedelta(minutes=10)


def native_bf16() -> bool:
    """Return whether this CPU has bf16 instructions; without them bf16 is 2 to 4 times slower than fp32."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"compute.device = {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"compute.device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if native_bf16() else "fp32"


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from names and numbers, such as ``seed_of(config.seed, "start", class_name)``.

    Seeds hang on what is computed (a class, a group, an iteration), never on who computes it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by ``seed_of``: the same numbers whatever device uses them."""
    return torch.Generator().manual_seed(seed_of(*parts))
