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

# The solver, POT and scikit-learn take more than a second to import. Only processes that need barycenters import them.

Pending = Callable[[], "Atoms"]
"""Call that waits for the atoms and returns them."""


Submit = Callable[[torch.Tensor, int, BarycenterConfig, int], Pending]
"""Starts ``barycenter`` with these arguments, without waiting for the result."""


def deferred(features: torch.Tensor, count: int, settings: BarycenterConfig, seed: int) -> Pending:
    """Return a call that computes ``barycenter`` of these arguments, in this process."""
    from wmdd.distill.barycenter.solve import barycenter

    return partial(barycenter, features, count, settings, seed)


@contextmanager
def solvers(workers: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Submit]:
    """Compute barycenters in worker processes. The results do not depend on the number of workers.

    The workers start with the first barycenter. They end with the ``with`` block or with this process.

    Args:
        workers: number of worker processes; 0 computes in this process, when a result is needed.
        stop: whether a stop was requested.

    Yields:
        A function that starts ``barycenter``. It returns a call that waits for the atoms, or raises the error of
        ``barycenter``.

    Raises:
        WmddError: a worker died.
        Interrupted: a worker was ended by the same signal that stopped the run.
    """
    if not workers:
        yield deferred
        return

    # Forked workers start at once, like DataLoader's. Forking is safe here even after torch's threads or a GPU were
    # used: the workers use numpy only.
    pool = ProcessPoolExecutor(processes(workers), get_context("fork"), _begin)

    def submit(features: torch.Tensor, count: int, settings: BarycenterConfig, seed: int) -> Pending:
        from wmdd.distill.barycenter.solve import atoms_of, checked  # imported before the fork, for the workers

        solved = pool.submit(checked, features.detach().numpy(), count, settings, seed)
        return lambda: atoms_of(*solved.result())

    try:
        yield submit
    except BrokenProcessPool:
        if stop():
            raise Interrupted("stopped while barycenters were computed") from None
        raise WmddError(
            "a process that computes barycenters died, perhaps for lack of memory; lower compute.workers, or use 0"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Set up a worker: one thread, and an end that follows the run's."""
    leave_to_the_run()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # when one worker dies, the pool ends the others by SIGTERM
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent exits; a killed parent cannot shut the pool down."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


def barycenters(
    features: Iterable[torch.Tensor], count: int, settings: BarycenterConfig, seeds: Iterable[int], workers: int = 0
) -> "Iterator[Atoms]":
    """Yield the barycenter of each class, in order. The results do not depend on the number of workers.

    ``features`` is read at most ``2 * workers`` classes ahead.

    Args:
        features: features of each class, [n, D].
        count: number K of atoms of each class.
        settings: settings of ``barycenter``.
        seeds: random seed of each class.
        workers: number of worker processes; 0 computes in this process.

    Raises:
        InputError: K is below 1, or above the n of a class.
        WmddError: a feature is not finite, or a worker died.
    """
    with solvers(workers) as submit:
        waiting: deque[Pending] = deque()
        for points, seed in zip(features, seeds, strict=True):
            waiting.append(submit(points, count, settings, seed))
            if len(waiting) > 2 * workers:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
