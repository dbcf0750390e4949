"""Count kernels, bytes, FLOPs and live memory of code that runs on tensors without values."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operations that only reserve memory"""
_OVERWRITES = ("copy_", "fill_", "zero_")
"""Operations in place that do not read what they overwrite"""


@dataclass(frozen=True)
class OpCounts:
    """Sums over operations."""

    kernels: int = 0
    """Number of operations that write memory. Fused operations of torch, and one convolution, are one kernel"""
    bytes: int = 0
    """Bytes of the inputs and outputs of these operations"""
    flops: int = 0
    """Floating-point operations of matrix products and convolutions"""

    def __add__(self, other: "OpCounts") -> "OpCounts":
        return OpCounts(self.kernels + other.kernels, self.bytes + other.bytes, self.flops + other.flops)

    def __sub__(self, other: "OpCounts") -> "OpCounts":
        return OpCounts(self.kernels - other.kernels, self.bytes - other.bytes, self.flops - other.flops)


class OpCounter(TorchDispatchMode):
    """Counts every operation of torch while it is active, and the bytes of all tensors that are alive.

    Memory is counted by storage, from the first operation that uses it until it is freed. The counts of an operation
    are those of its inputs and outputs: memory that a kernel needs in between is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = OpCounts()
        """Counts since the start"""
        self.live = 0
        """Bytes of all storages that are alive"""
        self.peak = 0
        """Largest value of ``live``"""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function._overloadpacket not in flop_registry and function.namespace == "aten":
            # In inference mode convolutions and others arrive whole: count what they consist of, as elsewhere.
            with self:
                found = function.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        before = tensors_in((args, kwargs))
        for tensor in before:
            self._see(tensor)
        found = function(*args, **kwargs)
        after = tensors_in(found)
        for tensor in after:
            self._see(tensor)
        if _is_kernel(function, before, after):
            read, written = _traffic(function, args, kwargs, after)
            packet = function._overloadpacket
            work = flop_registry[packet](*args, **kwargs, out_val=found) if packet in flop_registry else 0
            self.counts += OpCounts(1, sum(map(_size, read)) + sum(map(_size, written)), int(work))
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def steps_of(run: Callable[[Callable[[int], None]], object], steps: int) -> tuple[list[OpCounts], int]:
    """Return the counts of each step of ``run``, and the largest number of bytes alive in all of it.

    Args:
        run: does the steps; it calls its argument at the end of each.
        steps: number of steps that it does.
    """
    marks = [OpCounts()]
    with OpCounter() as counter:
        run(lambda done: marks.append(counter.counts))
    return [marks[step + 1] - marks[step] for step in range(steps)], counter.peak


def tensors_in(values: Any) -> list[Tensor]:
    """Return the different tensors in nested lists, tuples and dictionaries."""
    return list({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values())


def _is_kernel(function: Any, before: list[Tensor], after: list[Tensor]) -> bool:
    """Return whether an operation writes memory: it is no view, no allocation and no question about a tensor."""
    schema = function._schema
    if torch.Tag.inplace_view in function.tags or schema.name.removeprefix("aten::") in _ALLOCATIONS:
        return False
    if schema.is_mutable:
        return True
    old = {tensor.untyped_storage()._cdata for tensor in before}
    return any(tensor.untyped_storage()._cdata not in old for tensor in after)


def _traffic(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], after: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operation reads and those that it writes."""
    overwrites = function._schema.name.removeprefix("aten::") in _OVERWRITES
    read: list[Tensor] = []
    written: list[Tensor] = list(after)
    for place, argument in enumerate(function._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = tensors_in(value)
        if argument.is_write:
            written += tensors
        if not argument.is_out and not (overwrites and argument.is_write):
            read += tensors
    return tensors_in(read), tensors_in(written)


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory. An expanded dimension counts once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()
