"""Decoding: images are decoded ahead of use, in worker processes, in a fixed order."""

import atexit
import itertools
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from wmdd.errors import Interrupted, WmddError
from wmdd.runtime import cpus, signals

_DECODER_GRACE_SECONDS = 30
"""Seconds that a decoding process outlives SIGTERM: as long as SLURM leaves a task it has cancelled."""

Batch = TypeVar("Batch")


Result = TypeVar("Result")


class _Guarded(torch.utils.data.Dataset):
    """A function as DataLoader wants it; an error is returned, because raising it there would bury its message."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, batch: Any) -> Any:
        try:
            return self.function(batch)
        except WmddError as error:
            return error


def _outlast_signals(worker: int) -> None:
    """Go on after a signal to all processes of a run: it still wants its images while it checkpoints.

    SIGTERM is also how a process that ends in disorder ends its workers, so it is heeded after a while.
    """
    signals.leave_to_the_run()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_DECODER_GRACE_SECONDS))


def _unchanged(value: Result) -> Result:
    return value


def in_order(function: Callable[[Batch], Result], batches: Sequence[Batch], workers: int) -> Iterator[Result]:
    """Return ``function(batch)`` for each batch, worked out by one DataLoader of ``workers`` processes (0: here)."""
    if not workers or not batches:
        return map(function, batches)
    return _loaded(function, batches, min(cpus.processes(workers), len(batches)))


_streams: "WeakSet[Generator[Any, None, None]]" = WeakSet()


@atexit.register
def _close_streams() -> None:
    """End decoders in order when a program ends by an error: Python would send them SIGTERM and wait."""
    for stream in list(_streams):
        stream.close()


@contextmanager
def decoders(
    function: Callable[[Batch], Result], workers: int
) -> Iterator[Callable[[Sequence[Batch]], Iterator[Result]]]:
    """Yield ``in_order`` for one function, with processes that live as long as the context.

    The processes start with the first batches. Results must be read to their end before the next batches are given.
    """
    if not workers:
        yield lambda batches: map(function, batches)
        return
    waiting: deque[Batch] = deque()
    # The loader always asks for a few batches more than are read: it gets None where there is none.
    plan = (waiting.popleft() if waiting else None for _ in itertools.count())
    stream = _loaded(lambda batch: None if batch is None else function(batch), plan, cpus.processes(workers))

    def decode(batches: Sequence[Batch]) -> Iterator[Result]:
        waiting.extend(batches)
        for _ in batches:
            yield next(result for result in stream if result is not None)

    try:
        yield decode
    finally:
        stream.close()


def _loaded(function: Callable[[Any], Any], batches: Iterable[Any], processes: int) -> Generator[Any, None, None]:
    stream = _results(function, batches, processes)
    _streams.add(stream)
    return stream


def _results(function: Callable[[Any], Any], batches: Iterable[Any], processes: int) -> Generator[Any, None, None]:
    loader = torch.utils.data.DataLoader(
        _Guarded(function),
        batch_size=None,
        sampler=batches,
        num_workers=processes,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else it would draw its seed from the global one
        worker_init_fn=_outlast_signals,
        # Python 3.14 starts them otherwise: each would import torch and be sent all names.
        multiprocessing_context="fork",
    )
    try:
        for result in loader:
            if isinstance(result, WmddError):
                raise result
            yield result
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        if signals.requested():
            raise Interrupted("stopped while images were decoded") from None
        raise WmddError(
            f"a process that decodes images died ({error}); memory may be short: try fewer compute.workers, or 0"
        ) from error
