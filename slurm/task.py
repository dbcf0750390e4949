"""What runs inside a task: its share of the run, with stops that requeue and a trace that ``status`` can read.

A task imports torch only when it has work: one whose blocks are whole already ends in a fraction of a second.
"""

import logging
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm import scheduler
from wmdd.errors import EXIT_RESUMABLE, Interrupted, WmddError
from wmdd.runs.baselines import baseline_folders
from wmdd.runs.folder import RunFolder
from wmdd.runtime.log import on_screen
from wmdd.runtime.placement import Placement, placement_of
from wmdd.runtime.signals import stop_on

if TYPE_CHECKING:
    from slurm.profile import Stage

logger = logging.getLogger(f"wmdd.{__name__}")

ATTEMPTS = "slurm/attempts"
"""Folder, in that of the run, of one empty file a start: see ``Attempt``."""


@dataclass
class Attempt:
    """One start of a task, as an empty file whose name says it all.

    ``4711_3.0`` is the first start of task 3 of job 4711, ``4711_3.0.requeued.118`` the same once it has ended, after
    118 seconds.  A listing of the folder is the whole history; nothing is opened and no file has two writers.  A start
    without an end either runs or was killed.
    """

    path: Path
    begun: float

    @classmethod
    def begin(cls, folder: Path, task: str) -> "Attempt":
        """Leave the mark of a start."""
        path = folder / ATTEMPTS / f"{task}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return cls(path, time.monotonic())

    def end(self, outcome: str) -> None:
        """Leave the mark of an end: done, failed, requeued or stopped."""
        seconds = round(time.monotonic() - self.begun)
        self.path.replace(self.path.with_name(f"{self.path.name}.{outcome}.{seconds}"))


@dataclass(frozen=True)
class SlurmTask:
    """A share of a run; plain values only, so that its pickle is small and reading it imports nothing heavy."""

    config: dict[str, Any]
    """The resolved config: no file that may change meanwhile is read again"""
    folder: str
    """Of the run, absolute"""
    stage: "Stage"
    items: tuple[int, ...]
    """Blocks, or positions of students"""
    environment: dict[str, str]
    """What the submitting process had, and SLURM may not pass on"""
    max_restarts: int
    requeue: bool
    versions: tuple[str, str]
    """Python's and the package's, as they were at submission"""
    gpu: bool = False
    """Whether each rank asked SLURM for a GPU"""

    def __call__(self) -> None:
        """Do the share.

        Raises:
            SystemExit: it was asked to stop and has checkpointed; SLURM starts it again.
            WmddError: it failed, or came back too often.
        """
        # submitit's handlers would requeue at once, in mid-step; ours only set a flag, from here to the end.
        with on_screen(), stop_on(signal.SIGTERM, signal.SIGUSR2):
            if (here := versions()) != self.versions:
                wanted, found = " ".join(self.versions), " ".join(here)
                raise WmddError(f"submitted by Python and wmdd {wanted}, started by {found} ({sys.executable})")
            os.environ.update(self.environment)
            task, place = _join_ranks()
            main = place.rank == 0
            attempt = Attempt.begin(Path(self.folder), task) if main else None
            outcome = "failed"
            try:
                # Of several ranks one decides, in the run: they may see the folder at different times.
                outcome = "done" if place.size == 1 and self.is_whole() else self._outcome(main)
            finally:
                if attempt:
                    attempt.end(outcome)
            if outcome != "done" and main:
                sys.exit(EXIT_RESUMABLE)

    def _outcome(self, main: bool) -> str:
        try:
            self._work()
            return "done"
        except Interrupted as reason:
            # Only one rank may requeue, and it takes the others with it.
            return self._come_back(reason) if main else "stopped"

    def is_whole(self) -> bool:
        """Return whether every block of this task is there, for the run and for its baselines, without torch."""
        if self.stage != "distill":
            return False
        places = [Path(self.folder)]
        places += [places[0] / "baselines" / name for name in baseline_folders(self.config["student"])]
        runs = [RunFolder(place) for place in places]
        return all(run.sidecar(block) and not run.damaged(block) for run in runs for block in self.items)

    def _work(self) -> None:
        from wmdd import pipeline
        from wmdd.config.schema import Config

        blocks = self.items if self.stage == "distill" else None
        students = self.items if self.stage == "students" else None
        # A rank that was given a GPU and sees none must fail: on the CPU it would hold the GPU until its time limit.
        device = "cuda" if self.gpu and self.config["compute"]["device"] == "auto" else None
        share = pipeline.Share((self.stage,), blocks, students, device)
        pipeline.run(Config.model_validate(self.config), self.folder, share=share)

    def _come_back(self, reason: Interrupted) -> str:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        logger.info(f"stop requested: {reason}")
        if not self.requeue:
            raise WmddError("checkpointed; the profile says requeue = false: wmdd slurm submit goes on") from reason
        if restarts >= self.max_restarts:
            raise WmddError(f"came back {restarts} times; wmdd slurm submit goes on from its checkpoint") from reason
        if scheduler.requeue_myself():
            logger.info(f"back into the queue, restart {restarts + 1}")
            return "requeued"
        return "stopped"  # cancelled, or SLURM requeues it by itself


@dataclass(frozen=True)
class Program:
    """``python -m module arguments`` on every rank of a job."""

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    """What the submitting process had, and SLURM may not pass on"""

    def __call__(self) -> None:
        """Run it.

        Raises:
            SystemExit: it ended with an exit code other than 0.
        """
        os.environ.update(self.environment)
        _join_ranks()
        sys.argv = [self.module, *self.arguments]
        try:
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


def versions() -> tuple[str, str]:
    """Return the versions of Python and of the package that a task and its submitter must share."""
    return f"{sys.version_info.major}.{sys.version_info.minor}", version("wmdd")


def _join_ranks() -> tuple[str, Placement]:
    """Tell torch.distributed who this process is; return the task's name and where the process stands."""
    import submitit
    from submitit.helpers import TorchDistributedEnvironment

    # submitit would point CUDA_VISIBLE_DEVICES at the local rank, and two tasks of one node at the same GPU.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    job = submitit.JobEnvironment()
    # A process killed while submitit wrote its result leaves a file that would fail every later one.
    result = job.paths.result_pickle
    result.with_suffix(f"{result.suffix}.save_tmp").unlink(missing_ok=True)
    return job.job_id, placement_of(os.environ)
