"""Teams of ranks that work on one thing together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wmdd.errors import Interrupted

T = TypeVar("T")


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


SINGLE = Team(0, 1, 0, 1)
"""The team of a process that works by itself."""
