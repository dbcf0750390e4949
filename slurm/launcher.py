"""The launcher ``slurm`` (entry-point group ``wmdd.launchers``): whole runs as graphs of arrays, for protocols."""

from collections.abc import Sequence
from pathlib import Path

from slurm import scheduler, submit
from slurm.profile import STAGES, load_profile
from wmdd.config import Config
from wmdd.console import progress, say
from wmdd.launchers import Launcher


class Slurm(Launcher):
    """A cluster, under one profile.

    Args:
        profile: name of a profile that ships, or a TOML file.

    Raises:
        InputError: no such profile, or this machine cannot submit.
    """

    def __init__(self, profile: str) -> None:
        self._profile = load_profile(profile)
        scheduler.require("sbatch")

    def launch(self, runs: Sequence[tuple[Config, Path]], title: str) -> None:
        """Submit what is missing of every run and is not in the queue; ``wmdd slurm status FOLDER`` follows each."""
        stages = [stage for stage in STAGES if stage != "report"]  # whoever launched them reports them together
        submitted = jobs = 0
        with progress(f"submitting {title}", len(runs), "runs") as advance:
            for config, folder in runs:
                request = submit.prepare(config, folder, self._profile, stages=stages)
                if request.arrays:
                    jobs += len(submit.submit(request))
                    submitted += 1
                advance(1)
        say(f"{title}: {submitted} of {len(runs)} runs submitted, {jobs} jobs; the others are done or in the queue")
