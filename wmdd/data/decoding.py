"""Worker processes that decode images ahead of use, in a fixed order."""

import atexit
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
"""Seconds between SIGTERM and the end of a decoder: as long as SLURM gives a canceled task."""

Batch = TypeVar("Batch")


Result = TypeVar("Result")


class _Guarded(torch.utils.data.Dataset):
    """A function as a dataset for DataLoader.  It returns errors: DataLoader would hide the message of a raise."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, batch: Any) -> Any:
        try:
            return self.function(batch)
        except WmddError as error:
            return error


def _outlast_signals(worker: int) -> None:
    """Ignore stop signals in a decoder: the run decides when to stop, and needs images until its checkpoint.

    A parent that crashes also sends SIGTERM to its workers.  SIGTERM therefore does end a decoder, after a delay.
    """
    signals.leave_to_the_run()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_DECODER_GRACE_SECONDS))


def _unchanged(value: Result) -> Result:
    return value


def in_order(function: Callable[[Batch], Result], batches: Sequence[Batch], workers: int) -> Iterator[Result]:
    """Return ``function(batch)`` for each batch, computed in ``workers`` processes (0: in this process)."""
    if not workers or not batches:
        return map(function, batches)
    return _loaded(function, batches, min(cpus.processes(workers), len(batches)))


_streams: "WeakSet[Generator[Any, None, None]]" = WeakSet()


@atexit.register
def _close_streams() -> None:
    """End the decoders when a program ends with an error.  Otherwise Python would send them SIGTERM and wait."""
    for stream in list(_streams):
        stream.close()


@contextmanager
def decoders(
    function: Callable[[Batch], Result], workers: int, ahead: int = 2
) -> Iterator[Callable[[Sequence[Batch]], Iterator[Result]]]:
    """Yield ``in_order`` for one function, with processes that live as long as the context.

    The processes start with the first result that is read. From then on, a call starts the work on its batches at once.
    Results must be read in the order of the calls.

    Args:
        function: function of one batch.
        workers: number of processes; 0: the results are computed in this process, when they are read.
        ahead: number of batches that each process computes ahead of use.
    """
    if not workers:
        yield lambda batches: map(function, batches)
        return
    waiting: deque[Batch] = deque()
    requested: deque[bool] = deque()
    """For each result to come, in order, whether it belongs to a batch"""

    def plan() -> Iterator[Batch | None]:
        # The loader always requests a few batches ahead.  It gets None when no batch is waiting.
        while True:
            requested.append(bool(waiting))
            yield waiting.popleft() if waiting else None

    stream = _loaded(
        lambda batch: None if batch is None else function(batch), plan(), cpus.processes(workers), max(2, ahead)
    )

    def decode(batches: Sequence[Batch]) -> Iterator[Result]:
        waiting.extend(batches)
        # For each result without a batch that is taken, the loader requests one of the new batches.
        while waiting and requested and not requested[0]:
            next(stream)
            requested.popleft()
        return results(len(batches))

    def results(count: int) -> Iterator[Result]:
        while count:
            result = next(stream)
            if requested.popleft():
                count -= 1
                yield result

    try:
        yield decode
    finally:
        stream.close()


def _loaded(
    function: Callable[[Any], Any], batches: Iterable[Any], processes: int, ahead: int = 2
) -> Generator[Any, None, None]:
    stream = _results(function, batches, processes, ahead)
    _streams.add(stream)
    return stream


def _results(
    function: Callable[[Any], Any], batches: Iterable[Any], processes: int, ahead: int
) -> Generator[Any, None, None]:
    loader = torch.utils.data.DataLoader(
        _Guarded(function),
        batch_size=None,
        sampler=batches,
        num_workers=processes,
        prefetch_factor=ahead,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # otherwise DataLoader draws its seed from the global generator
        worker_init_fn=_outlast_signals,
        # Python 3.14 has another default, with which each process imports torch and receives all names.
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
            f"a process that decodes images died ({error}), perhaps for lack of memory; try fewer compute.workers, or 0"
        ) from error
