"""Launchers start runs and jobs: in this process, in several processes, or through another package.

A package registers a function ``target -> Launcher`` in the entry-point group ``wmdd.launchers``.  The target of
``slurm`` is the name of a profile.
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
"""Seconds between two checks of the stop request and of the worker processes."""
_TORCHRUN_GRACE_SECONDS = 45.0
"""Seconds that torchrun has to exit.  torchrun itself kills ranks that need more than 30."""


@dataclass(frozen=True)
class Step:
    """A program that runs on several ranks, which find each other as under torchrun."""

    ranks: int
    module: str
    """Name of the module; each rank runs ``python -m MODULE ARGUMENTS``"""
    arguments: tuple[str, ...]
    """Arguments of the module, the same for all ranks"""
    folder: Path
    """Folder of the step, on a disk that all nodes share.  At its end each rank writes ``rank-00000.json`` there."""

    def is_done(self) -> bool:
        """Return whether every rank has written its file."""
        return all((self.folder / f"rank-{rank:05d}.json").exists() for rank in range(self.ranks))


class Launcher(ABC):
    """Does runs and jobs, or submits them to a scheduler."""

    @abstractmethod
    def launch(self, runs: Sequence[tuple[Config, Path]], title: str) -> None:
        """Complete every run (config, run folder), or submit the missing work and return.

        Raises:
            InputError: a run cannot be done; no run was begun.
            Interrupted: a stop was requested; finished work is kept.
        """

    @abstractmethod
    def run_steps(self, steps: Sequence[Step], folder: Path) -> None:
        """Run the steps one after the other, each with new processes, and wait for the last.

        Args:
            steps: steps to run; finished steps are skipped.
            folder: folder of the job, on a disk that all nodes share.

        Raises:
            WmddError: a step failed; the message contains its last message.
            Interrupted: a stop was requested; the same command runs the unfinished steps.
        """


class Local(Launcher):
    """Does runs and jobs on this machine.

    Args:
        jobs: number of simultaneous runs.  Each has ``compute.threads`` threads.  The runs get the GPUs in turn.
        deadline: time (``time.monotonic``) at which the runs get a stop request, as by SIGTERM; None: never.
    """

    def __init__(self, jobs: int = 1, deadline: float | None = None) -> None:
        self._jobs = jobs
        self._deadline = deadline

    def launch(self, runs: Sequence[tuple[Config, Path]], title: str) -> None:
        """Do the runs in order, ``jobs`` at a time.  A run that fails stops the others at their next safe point.

        A stopped run resumes later: a group at its iteration, a teacher or student at its epoch.  A process that has
        not stopped after ``worker.GRACE_SECONDS`` is killed.
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
                raise Interrupted(f"stopped with {left} of {len(runs)} runs left; the same command resumes") from reason

    def run_steps(self, steps: Sequence[Step], folder: Path) -> None:
        """Run each step under torchrun."""
        with progress_bars.progress("measuring", len(steps), "steps") as advance:
            for step in steps:
                if not step.is_done():
                    self.job(step.ranks, step.module, step.arguments)
                advance(1)

    def job(self, ranks: int, module: str, arguments: Sequence[str]) -> None:
        """Run ``python -m module arguments`` on ``ranks`` ranks under torchrun.

        Raises:
            WmddError: the job failed; the message contains its last message.
            Interrupted: a stop was requested; every rank has ended.
        """
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, "-m", module, *arguments]
        with stop_on(*STOPS) as stop, TemporaryFile("w+") as said:
            torchrun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=rankless())  # noqa: S603
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


def rankless() -> dict[str, str]:
    """Return the environment without the variables by which this process may itself be a rank, for its processes."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def _terminate(torchrun: "subprocess.Popen[bytes]") -> None:
    """End a job and its ranks.  torchrun ends the ranks on SIGTERM; on SIGKILL it could not."""
    torchrun.terminate()
    try:
        torchrun.wait(_TORCHRUN_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.wait()


def last_words(said: str) -> str:
    """Return the error line of a job's output, without the lines that launchers add."""
    lines = said.splitlines() or ["it printed nothing"]
    return next((line for line in lines if line.startswith("wmdd: ")), lines[-1]).removeprefix("wmdd: ").strip()


def _one_by_one(runs: Iterable[tuple[Config, Path]]) -> Iterator[None]:
    """Do runs in this process; yields after each run."""
    for config, folder in runs:
        worker.do(config, folder)
        yield


def _share(runs: Sequence[tuple[Config, Path]], jobs: int, stop: StopRequest) -> Iterator[None]:
    """Do runs in several processes; yields after each run."""
    todo = iter(runs)
    named = any(config.compute.device.startswith("cuda:") for config, _ in runs)
    gpus = 0 if named else torch.cuda.device_count()  # this call creates no CUDA context
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    workers = [Worker(gpu_of(visible, gpus, index)) for index in range(min(jobs, len(runs)))]
    busy = list(workers)
    try:
        for one in workers:
            one.give(next(todo))
        while busy:
            if stop():
                raise Interrupted("stopped while worker processes were running")
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
    """A worker process that does runs for this process.

    Args:
        gpu: the only GPU that the worker sees, as CUDA_VISIBLE_DEVICES names it; None: all GPUs of this process.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.pipe, theirs = Pipe()
        pinned = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        # The worker inherits the blocked signals.  A stop signal thus waits until the worker can handle it.
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
        """Send a run.  None means: no further run comes; stop the current one."""
        with suppress(OSError):  # the worker is dead; the next poll notices it
            self.pipe.send(run)

    def take(self) -> None:
        """Receive the result of a run.  The message is short, so it arrives whole or not at all.

        Raises:
            WmddError: the run failed, or the worker died.
        """
        try:
            failure = self.pipe.recv()
        except (EOFError, OSError):
            raise self.obituary() from None
        if failure:
            raise worker.unpacked(failure)

    def obituary(self) -> WmddError:
        """Return the error that explains why the worker ended during a run."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_POLL_SECONDS)
        code = self.process.returncode or -signal.SIGKILL
        if -code in STOPS:
            return Interrupted("a worker process was stopped")
        if code > 0:
            return WmddError(f"a worker process failed with exit code {code}; its message is above")
        return WmddError("a worker process was killed, perhaps for lack of memory; try fewer --jobs")


def _end(workers: Sequence[Worker]) -> None:
    """Ask the workers to checkpoint and exit.  Kill workers that take longer than ``worker.GRACE_SECONDS``."""
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
            f"{late} of {len(workers)} worker processes did not stop within {worker.GRACE_SECONDS:.0f} s and were"
            " killed; their runs resume from their last checkpoints"
        )


def gpu_of(visible: str | None, count: int, index: int) -> str | None:
    """Return the GPU of a worker process, as CUDA_VISIBLE_DEVICES names it; None if the parent sees no GPU.

    Args:
        visible: CUDA_VISIBLE_DEVICES of the parent; None if it is not set.
        count: number of GPUs that the parent sees.
        index: position of the worker.
    """
    names = list(map(str, range(count))) if visible is None else visible.split(",")[:count]
    return names[index % len(names)].strip() if names else None


def find(name: str, target: str) -> Launcher:
    """Return the launcher of another package for a target, such as a SLURM profile.

    Raises:
        InputError: no launcher has this name, or the target is wrong.
    """
    known = {point.name: point for point in entry_points(group="wmdd.launchers")}
    if name not in known:
        raise InputError(f"no launcher {name!r} is installed; {nearest(name, sorted(known))}")
    launcher: Launcher = known[name].load()(target)
    return launcher
