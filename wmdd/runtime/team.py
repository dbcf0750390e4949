"""Teams: ranks that share one student or one class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wmdd.errors import Interrupted

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Ranks that work together on one student or class.  The job has ``count`` teams."""

    index: int
    """Position of the team in the job"""
    count: int
    rank: int
    """Rank of this process within its team"""
    size: int
    group: Any = None
    """Process group of the team; None for a team of one rank"""

    def own(self, start: int, stop: int) -> slice:
        """Return this rank's rows of the batch from ``start`` to ``stop``: every ``size``-th row."""
        return slice(start + self.rank, stop, self.size)

    def shard(self, rows: Tensor) -> Tensor:
        """Return this rank's rows."""
        return rows[self.own(0, len(rows))] if self.size > 1 else rows

    def wrap(self, network: nn.Module, example: Tensor) -> nn.Module:
        """Return the network under DistributedDataParallel when the team has more than one rank.

        DDP averages over ranks.  The loss must therefore be the sum over this rank's rows, times ``size / rows of the
        batch``.

        Args:
            network: network on its device, in training mode.
            example: two or more inputs on the same device; their values do not matter.
        """
        if self.size == 1:
            return network
        parallel = nn.parallel.DistributedDataParallel(network, process_group=self.group)
        if self.size > 2:
            # DDP rearranges its gradient buckets after the first backward pass.  With more than two ranks the buckets
            # decide the order of the sum.  An extra first pass makes a resumed round equal to an uninterrupted one.
            before = [buffer.clone() for buffer in network.buffers()]
            with torch.random.fork_rng([example.device] if example.device.type == "cuda" else []):
                parallel(example).sum().backward()
            for buffer, value in zip(network.buffers(), before, strict=True):
                buffer.copy_(value)
            network.zero_grad(set_to_none=True)
        return parallel

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the team, the same on every rank.

        The gradient passes through unchanged: all ranks have the same loss, and each rank needs the derivative with
        respect to its own values."""
        return _TeamSum.apply(values, self.group) if self.size > 1 else values

    def anyone(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank of the team."""
        return [count > 0 for count in self.sum(torch.tensor([float(flag) for flag in flags])).tolist()]

    def alike(self, value: float) -> bool:
        """Return whether the value is the same on all ranks of the team."""
        return len({float(one) for one in self.gather(torch.tensor(value, dtype=torch.float64))}) == 1

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``.  If a stop interrupts it on one rank, all ranks raise ``Interrupted``.

        Use it for work without common steps at which ranks could agree, such as decoding.

        Raises:
            Interrupted: ``work`` raised it on a rank of the team.
        """
        try:
            done = work()
        except Interrupted:
            self.anyone(True)
            raise
        if any(self.anyone(False)):
            raise Interrupted("stopped because another rank was stopped")
        return done

    def share_buffers(self, network: nn.Module) -> None:
        """Copy the buffers of the team's first rank to all ranks, so that all have the same network.

        DistributedDataParallel does so before each forward pass.  After the last pass each rank has the BatchNorm
        statistics of its own images.
        """
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, group=self.group, group_src=0)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks of the team, in the order of the ranks.  All must have the same shape."""
        if self.size == 1:
            return [values]
        # Contiguous like the sent tensor: a receiver in another layout would get permuted values.
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
"""The team of a process that works alone."""
