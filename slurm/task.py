"""What runs inside a task: its share of the run, with stops that requeue and a trace that ``status`` can read.

A task imports torch only when it has work: one whose blocks are whole already ends in a fraction of a second.
"""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm.attempts import STARTS_WITHOUT_PROGRESS, Attempt
from wmdd.errors import EXIT_RESUMABLE, InputError, Interrupted, WmddError, tell
from wmdd.runs.baselines import baseline_folders
from wmdd.runs.folder import RunFolder
from wmdd.runtime import interpreter
from wmdd.runtime.device_check import DeviceFault, check_device
from wmdd.runtime.log import on_screen
from wmdd.runtime.placement import Placement, placement_of
from wmdd.runtime.signals import stop_on
from wmdd.storage.files import digest

if TYPE_CHECKING:
    from slurm.profile import Stage

logger = logging.getLogger(f"wmdd.{__name__}")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a rank: of a shell that submits under torchrun, none of it holds for a task."""


@dataclass(frozen=True)
class SlurmTask:
    """A share of a run; plain values only, so that its pickle is small and reading it imports nothing heavy."""

    config: dict[str, Any]
    """The resolved config: no file that may change meanwhile is read again"""
    folder: str
    """Run folder, absolute"""
    stage: "Stage"
    items: tuple[int, ...]
    """Blocks, or positions of students"""
    environment: dict[str, str]
    """Variables of the submitting process and of the profile; ``$NAME`` stands for a variable of the task"""
    versions: tuple[str, str]
    """Versions of Python and of the package at submission"""
    gpu: bool = False
    """Whether each rank asked SLURM for a GPU"""
    files: tuple[str, ...] = ()
    """Files in the run folder that the items leave, parts included"""

    def __call__(self) -> None:
        """Do the share, and leave an attempt whose name says how it ended; ``teardown.sh`` acts on it.

        Raises:
            SystemExit: it failed, or was asked to stop and has checkpointed.
        """
        interpreter.expect_many_objects()
        # submitit's handlers would requeue at once, in mid-step; ours only set a flag, from here to the end.
        with on_screen(), stop_on(signal.SIGTERM, signal.SIGUSR2):
            os.environ.update({key: os.path.expandvars(value) for key, value in self.environment.items()})
            name, place = _join_ranks()
            attempt = Attempt.of(Path(self.folder), name)
            main = place.rank == 0
            outcome = "failed"
            if main:
                attempt.begin()
            try:
                outcome = self._outcome(place, attempt)
            except DeviceFault as error:
                attempt.blame_node()
                _leave(error)
            except InputError as error:
                outcome = "refused"
                _leave(error)
            except WmddError as error:
                _leave(error)
            finally:
                if main:
                    attempt.end(outcome)
            if main and outcome == "stuck":
                _leave(WmddError(_STUCK.format(self.stage)))
            if main and outcome != "done":
                sys.exit(EXIT_RESUMABLE)

    def _outcome(self, place: Placement, attempt: Attempt) -> str:
        if (here := versions()) != self.versions:
            wanted, found = " ".join(self.versions), " ".join(here)
            raise InputError(f"submitted by Python and wmdd {wanted}, started by {found} ({sys.executable})")
        try:
            # Of several ranks one decides, in the run: they may see the folder at different times.
            if place.size > 1 or not self.is_whole():
                self._work()
            return "done"
        except Interrupted as reason:
            logger.info(f"stop requested: {reason}")
            state = digest([str(reason), [(Path(self.folder) / file).exists() for file in self.files]])[:8]
            return "stuck" if place.rank == 0 and attempt.is_stuck(state) else f"stopped-{state}"

    def is_whole(self) -> bool:
        """Return whether every block of this task is there, for the run and for its baselines, without torch."""
        if self.stage != "distill":
            return False
        places = [Path(self.folder)]
        places += [places[0] / "baselines" / name for name in baseline_folders(self.config["student"])]
        runs = [RunFolder(place) for place in places]
        return all(run.sidecar(block) and not run.damaged(block) for run in runs for block in self.items)

    def _work(self) -> None:
        # A rank that was given a GPU and sees none must fail: on the CPU it would hold the GPU until its time limit.
        wanted = self.config["compute"]["device"]
        device = "cuda" if self.gpu and wanted == "auto" else None
        if self.stage != "report":
            check_device(device or wanted)
        from wmdd import pipeline
        from wmdd.config.schema import Config

        blocks = self.items if self.stage == "distill" else None
        students = self.items if self.stage == "students" else None
        share = pipeline.Share((self.stage,), blocks, students, device)
        pipeline.run(Config.model_validate(self.config), self.folder, share=share)


_STUCK = (
    "the {} task was stopped "
    + str(STARTS_WITHOUT_PROGRESS)
    + " times at the same point: its start takes longer than its time limit; raise minutes in the profile"
)


def _leave(error: WmddError) -> None:
    """Say what is wrong and end this process.

    Raises:
        SystemExit: always, with the exit code of the error.
    """
    tell(error)
    sys.exit(error.exit_code)


def versions() -> tuple[str, str]:
    """Return the versions of Python and of the package that a task and its submitter must share."""
    return f"{sys.version_info.major}.{sys.version_info.minor}", version("wmdd")


def _join_ranks() -> tuple[str, Placement]:
    """Return SLURM's name of the task, and where this process stands among the ranks that srun has started."""
    import submitit

    for key in RANK_VARIABLES:
        os.environ.pop(key, None)
    job = submitit.JobEnvironment()
    # A process killed while submitit wrote its result leaves a file that would fail every later one.
    result = job.paths.result_pickle
    result.with_suffix(f"{result.suffix}.save_tmp").unlink(missing_ok=True)
    return job.job_id, placement_of(os.environ)
