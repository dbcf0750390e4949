"""Where work is done: here, in several processes, or through a launcher that another package brings.

A launcher registers a function ``target -> Launcher`` in the entry-point group ``wmdd.launchers``; ``slurm`` takes the
name of a profile.
"""

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from wmdd import console, pipeline
from wmdd.config import Config
from wmdd.errors import InputError, Interrupted, WmddError, nearest
from wmdd.signals import StopRequest, stop_after, stop_on

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Launcher(ABC):
    """Does work, or sees to it that it is done."""

    @abstractmethod
    def launch(self, runs: Sequence[tuple[Config, Path]], title: str) -> None:
        """Do what is missing of every run (config, folder), or submit it and return.

        Raises:
            InputError: a run cannot be done; none was begun.
            Interrupted: a stop was requested; what was done is kept.
        """

    @abstractmethod
    def job(self, ranks: int, module: str, arguments: Sequence[str], folder: Path) -> None:
        """Run ``python -m module arguments`` on so many ranks of one job, and wait for its end.

        Args:
            ranks: processes, which find each other as those of torchrun do.
            module: what they run.
            arguments: the same for all.
            folder: for the logs of the job; on a disk that its nodes share.

        Raises:
            WmddError: it failed; the message has its last words.
        """


class Local(Launcher):
    """This machine.

    Args:
        jobs: runs at a time; each has ``compute.threads`` threads.
        deadline: from when on, by ``time.monotonic``, no run is begun and those at work are asked to stop, as SIGTERM
            asks them; None: never.
    """

    def __init__(self, jobs: int = 1, deadline: float | None = None) -> None:
        self._jobs = jobs
        self._deadline = deadline

    def launch(self, runs: Sequence[tuple[Config, Path]], title: str) -> None:
        """Do the runs in order, ``jobs`` at a time; the first that fails stops the others at their next safe point.

        What is stopped goes on where it was: a group at its iteration, a teacher or student at its epoch.
        """
        seconds = None if self._deadline is None else self._deadline - time.monotonic()
        left = len(runs)
        with (
            console.progress(title, left, "runs") as advance,
            stop_on(*_STOPS) as stop,
            stop_after(seconds),
        ):
            try:
                for _ in _one_by_one(runs, stop) if self._jobs == 1 else _share(runs, self._jobs, stop):
                    left -= 1
                    advance(1)
            except Interrupted as reason:
                raise Interrupted(
                    f"stopped with {left} of {len(runs)} runs to do; the same command goes on"
                ) from reason

    def job(self, ranks: int, module: str, arguments: Sequence[str], folder: Path) -> None:
        """Start the ranks under torchrun."""
        # The ranks of this very process, if it is one of several, would confuse torchrun.
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, "-m", module, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)  # noqa: S603
        if done.returncode:
            raise WmddError(f"a job of {ranks} ranks failed: {last_words(done.stderr)}")


def last_words(said: str) -> str:
    """Return the line in which a job says what is wrong, among all that launchers add."""
    lines = said.splitlines() or ["it said nothing"]
    return next((line for line in lines if line.startswith("wmdd: ")), lines[-1]).removeprefix("wmdd: ").strip()


def _one_by_one(runs: Iterable[tuple[Config, Path]], stop: StopRequest) -> Iterator[None]:
    """Do runs in this process; yields after each."""
    for config, folder in runs:
        if stop():
            raise Interrupted("stopped between two runs")
        _run(config, folder)
        yield


def _share(runs: Sequence[tuple[Config, Path]], jobs: int, stop: StopRequest) -> Iterator[None]:
    """Do runs in so many processes; yields after each."""
    # Each process imports torch anew: a forked one may hang in its thread pools.
    fresh = multiprocessing.get_context("spawn")
    todo, done = fresh.Queue(), fresh.Queue()
    todo.cancel_join_thread()  # else what nobody takes any more would keep this process from ending
    for run in runs:
        todo.put(run)
    workers = [fresh.Process(target=_work, args=(todo, done)) for _ in range(min(jobs, len(runs)))]
    for worker in workers:
        todo.put(None)
        worker.start()
    finished = 0
    try:
        while finished < len(runs):
            if stop():
                raise Interrupted("stopped while processes were at work")
            try:
                failure = done.get(timeout=0.2)
            except queue.Empty:
                if any(worker.exitcode for worker in workers) and not stop():
                    raise WmddError(
                        "a process that did runs was killed; memory may be short: try fewer --jobs"
                    ) from None
                continue
            if failure:
                raise failure
            finished += 1
            yield
    finally:
        # Its run checkpoints and leaves.  It may have got the signal that came here, and a second of a kind kills.
        number = signal.SIGTERM if stop.signal == signal.SIGUSR2 else signal.SIGUSR2
        for worker in workers:
            if worker.pid and worker.is_alive():
                os.kill(worker.pid, number)
        for worker in workers:
            worker.join()


def _work(todo: Any, done: Any) -> None:
    console.quiet = True
    with stop_on(*_STOPS) as stop:
        try:
            for _ in _one_by_one(iter(todo.get, None), stop):
                done.put(None)
        except WmddError as error:
            done.put(error)


def find(name: str, target: str) -> Launcher:
    """Return the launcher of another package, made for a target such as a SLURM profile.

    Raises:
        InputError: there is none of that name, or the target is wrong.
    """
    known = {point.name: point for point in entry_points(group="wmdd.launchers")}
    if name not in known:
        raise InputError(f"no launcher {name!r} is installed; {nearest(name, sorted(known))}")
    launcher: Launcher = known[name].load()(target)
    return launcher


def _run(config: Config, folder: Path) -> None:
    # Whoever launched several runs reports them together.
    pipeline.run(config, folder, share=pipeline.Share(("teacher", "distill", "students")))
