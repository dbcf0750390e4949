"""Barycenters of many classes, in worker processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING

import torch
from threadpoolctl import threadpool_limits

from wmdd.config.schema import BarycenterConfig
from wmdd.errors import Interrupted, WmddError
from wmdd.runtime.cpus import processes
from wmdd.runtime.signals import leave_to_the_run

if TYPE_CHECKING:
    from wmdd.distill.barycenter.solve import Atoms

# The solver, POT and scikit-learn take more than a second to import.  Only a process that asks for a barycenter does.

Pending = Callable[[], "Atoms"]
"""Atoms that may still be computed: the call waits for them."""


Submit = Callable[[torch.Tensor, int, BarycenterConfig, int], Pending]
"""Asks for the barycenter of these arguments, and does not wait for it."""


def deferred(features: torch.Tensor, count: int, settings: BarycenterConfig, seed: int) -> Pending:
    """Return a call that computes ``barycenter`` of these arguments, in this process."""
    from wmdd.distill.barycenter.solve import barycenter

    return partial(barycenter, features, count, settings, seed)


@contextmanager
def solvers(workers: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Submit]:
    """Compute barycenters in other processes while this one goes on: the same bytes, whatever their number.

    The processes start with the first barycenter asked for, and end with the block or with this process.

    Args:
        workers: number of processes; 0 computes in this one, when the atoms are called for.
        stop: whether the run was asked to stop.

    Yields:
        a function of ``barycenter``'s arguments; what it returns, called, waits for the atoms and raises what
        ``barycenter`` raises.

    Raises:
        WmddError: a process died.
        Interrupted: it died of what asked the run to stop.
    """
    if not workers:
        yield deferred
        return

    # Forked, as DataLoader's workers are: they start at once.  Nothing but numpy is used in them, neither torch's
    # threads nor a GPU, so that they may be forked after both have been in use.
    pool = ProcessPoolExecutor(processes(workers), get_context("fork"), _begin)

    def submit(features: torch.Tensor, count: int, settings: BarycenterConfig, seed: int) -> Pending:
        from wmdd.distill.barycenter.solve import atoms_of, checked  # here, so that the forked processes have it

        solved = pool.submit(checked, features.detach().numpy(), count, settings, seed)
        return lambda: atoms_of(*solved.result())

    try:
        yield submit
    except BrokenProcessPool:
        if stop():
            raise Interrupted("stopped while barycenters were computed") from None
        raise WmddError(
            "a process that computes barycenters died; memory may be short: try fewer compute.workers, or 0"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Make a forked process a solver: of one thread, and none that outlives the run or ends before it."""
    leave_to_the_run()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends them once one of them is dead
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the process that forked this one: killed, it cannot tell its solvers."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


def barycenters(
    features: Iterable[torch.Tensor], count: int, settings: BarycenterConfig, seeds: Iterable[int], workers: int = 0
) -> "Iterator[Atoms]":
    """Yield what ``barycenter`` returns for each class, in the order given, whatever the number of workers.

    Classes are read from ``features`` no further ahead than twice the number of workers.

    Args:
        features: of each class, [n, D].
        count: number K of atoms of each class.
        settings: as of ``barycenter``.
        seeds: one for each class.
        workers: processes that compute; 0 computes in this one.

    Raises:
        InputError: K is below 1, or above the n of a class.
        WmddError: a feature is not finite, or a process died.
    """
    with solvers(workers) as submit:
        waiting: deque[Pending] = deque()
        for points, seed in zip(features, seeds, strict=True):
            waiting.append(submit(points, count, settings, seed))
            if len(waiting) > 2 * workers:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
