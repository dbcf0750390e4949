"""Where work is done: here, in several processes, or through a launcher that another package brings.

A launcher registers a function ``target -> Launcher`` in the entry-point group ``wmdd.launchers``; ``slurm`` takes the
name of a profile.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from tempfile import TemporaryFile

import torch

from wmdd import worker
from wmdd.config.schema import Config
from wmdd.errors import InputError, Interrupted, WmddError, nearest
from wmdd.runtime import progress_bars
from wmdd.runtime.signals import STOPS, StopRequest, stop_after, stop_on

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""Seconds between two looks at a stop request and at the processes at work."""
_TORCHRUN_GRACE_SECONDS = 45.0
"""Seconds that torchrun has to end; it kills ranks that take more than 30."""


@dataclass(frozen=True)
class Step:
    """A program on some ranks, which find each other as those of torchrun do."""

    ranks: int
    module: str
    """Name of the module; each rank runs ``python -m MODULE ARGUMENTS``"""
    arguments: tuple[str, ...]
    """The same for all ranks"""
    folder: Path
    """Folder of the step, on a disk that all nodes share.  At its end each rank writes ``rank-00000.json`` there."""

    def is_done(self) -> bool:
        """Return whether every rank has written its file."""
        return all((self.folder / f"rank-{rank:05d}.json").exists() for rank in range(self.ranks))


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
    def run_steps(self, steps: Sequence[Step], folder: Path) -> None:
        """Run steps one after the other, each with all that it takes to start, and wait for the end of the last.

        Args:
            steps: steps; those that are done are left out.
            folder: folder of the job, on a disk that all nodes share.

        Raises:
            WmddError: a step failed; the message has its last words.
            Interrupted: a stop was requested; the same command runs the steps that are not done.
        """


class Local(Launcher):
    """This machine.

    Args:
        jobs: number of runs at a time; each has ``compute.threads`` threads, and a GPU of its own where there are as
            many.
        deadline: time, by ``time.monotonic``, at which the runs are asked to stop as by SIGTERM; None: never.
    """

    def __init__(self, jobs: int = 1, deadline: float | None = None) -> None:
        self._jobs = jobs
        self._deadline = deadline

    def launch(self, runs: Sequence[tuple[Config, Path]], title: str) -> None:
        """Do the runs in order, ``jobs`` at a time; the first that fails stops the others at their next safe point.

        What is stopped resumes where it was: a group at its iteration, a teacher or student at its epoch.  What has not
        stopped ``worker.GRACE_SECONDS`` later is killed.
        """
        seconds = None if self._deadline is None else self._deadline - time.monotonic()
        left = len(runs)
        with (
            progress_bars.progress(title, left, "runs") as advance,
            stop_on(*STOPS) as stop,
            stop_after(seconds, stop),
        ):
            try:
                for _ in _one_by_one(runs) if self._jobs == 1 else _share(runs, self._jobs, stop):
                    left -= 1
                    advance(1)
            except Interrupted as reason:
                raise Interrupted(
                    f"stopped with {left} of {len(runs)} runs to do; the same command goes on"
                ) from reason

    def run_steps(self, steps: Sequence[Step], folder: Path) -> None:
        """Run each step under torchrun."""
        with progress_bars.progress("measuring", len(steps), "steps") as advance:
            for step in steps:
                if not step.is_done():
                    self.job(step.ranks, step.module, step.arguments)
                advance(1)

    def job(self, ranks: int, module: str, arguments: Sequence[str]) -> None:
        """Run ``python -m module arguments`` on some ranks under torchrun.

        Raises:
            WmddError: it failed; the message has its last words.
            Interrupted: a stop was requested; every rank has ended.
        """
        # The ranks of this very process, if it is one of several, would confuse torchrun.
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, "-m", module, *arguments]
        with stop_on(*STOPS) as stop, TemporaryFile("w+") as said:
            torchrun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=clean)  # noqa: S603
            try:
                while not stop() and torchrun.poll() is None:
                    time.sleep(_POLL_SECONDS)
            finally:
                _terminate(torchrun)
            if torchrun.returncode and stop():
                raise Interrupted(f"stopped during a job of {ranks} ranks")
            if torchrun.returncode:
                said.seek(0)
                raise WmddError(f"a job of {ranks} ranks failed: {last_words(said.read())}")


def _terminate(torchrun: "subprocess.Popen[bytes]") -> None:
    """End a job with its ranks, which torchrun does when it is terminated, and could not do once it is killed."""
    torchrun.terminate()
    try:
        torchrun.wait(_TORCHRUN_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.wait()


def last_words(said: str) -> str:
    """Return the line in which a job says what is wrong, among all that launchers add."""
    lines = said.splitlines() or ["it said nothing"]
    return next((line for line in lines if line.startswith("wmdd: ")), lines[-1]).removeprefix("wmdd: ").strip()


def _one_by_one(runs: Iterable[tuple[Config, Path]]) -> Iterator[None]:
    """Do runs in this process; yields after each."""
    for config, folder in runs:
        worker.do(config, folder)
        yield


def _share(runs: Sequence[tuple[Config, Path]], jobs: int, stop: StopRequest) -> Iterator[None]:
    """Do runs in several processes; yields after each."""
    todo = iter(runs)
    named = any(config.compute.device.startswith("cuda:") for config, _ in runs)
    gpus = 0 if named else torch.cuda.device_count()  # this makes no CUDA context
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    workers = [Worker(gpu_of(visible, gpus, index)) for index in range(min(jobs, len(runs)))]
    busy = list(workers)
    try:
        for one in workers:
            one.give(next(todo))
        while busy:
            if stop():
                raise Interrupted("stopped while processes were at work")
            ready = wait([one.pipe for one in busy], timeout=_POLL_SECONDS)
            for one in list(busy):
                if one.pipe in ready:
                    one.take()
                    following = next(todo, None)
                    one.give(following)
                    if following is None:
                        busy.remove(one)
                    yield
                elif one.process.poll() is not None:
                    raise one.obituary()
    finally:
        _end(workers)


class Worker:
    """A process that does runs for this one.

    Args:
        gpu: the only GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None: those that this process sees.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.pipe, theirs = Pipe()
        pinned = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        # The worker inherits what is blocked here: a stop signal waits until the worker can heed it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", worker.__name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | pinned,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def give(self, run: tuple[Config, Path] | None) -> None:
        """Send a run; None: no other comes, and the one at work is to stop."""
        with suppress(OSError):  # it is dead, as the next look will find
            self.pipe.send(run)

    def take(self) -> None:
        """Take the answer to a run; it is short, so it arrives whole or not at all.

        Raises:
            WmddError: the run failed, or the process died.
        """
        try:
            failure = self.pipe.recv()
        except (EOFError, OSError):
            raise self.obituary() from None
        if failure:
            raise worker.unpacked(failure)

    def obituary(self) -> WmddError:
        """Return why a process that has ended did so in the middle of a run."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_POLL_SECONDS)
        code = self.process.returncode or -signal.SIGKILL
        if -code in STOPS:
            return Interrupted("a process that did runs was stopped")
        if code > 0:
            return WmddError(f"a process that did runs failed with exit code {code}; its message is above")
        return WmddError("a process that did runs was killed; memory may be short: try fewer --jobs")


def _end(workers: Sequence[Worker]) -> None:
    """Let the processes checkpoint and end, and kill those that do not in time."""
    for one in workers:
        one.give(None)
    deadline = time.monotonic() + worker.GRACE_SECONDS
    late = 0
    for one in workers:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late += 1
            one.process.kill()
        one.pipe.close()
    if late:
        logger.warning(
            f"{late} of {len(workers)} processes did not stop within {worker.GRACE_SECONDS:.0f} s and were killed;"
            " they resume from their last checkpoints"
        )


def gpu_of(visible: str | None, count: int, index: int) -> str | None:
    """Return the GPU of a process among several that do runs, as CUDA_VISIBLE_DEVICES names it; None: no choice.

    Args:
        visible: CUDA_VISIBLE_DEVICES of the parent; None: unset.
        count: number of GPUs that the parent sees.
        index: position of the process.
    """
    names = list(map(str, range(count))) if visible is None else visible.split(",")[:count]
    return names[index % len(names)].strip() if names else None


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
