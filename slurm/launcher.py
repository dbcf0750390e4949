"""The launcher ``slurm`` (entry point of ``wmdd.launchers``): whole runs as graphs of arrays, jobs of many ranks."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import scheduler, submit
from slurm.plan import Selection
from slurm.profile import STAGES, load_profile
from slurm.task import Program
from wmdd.config.schema import Config
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.launchers import Launcher, last_words
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.signals import requested
from wmdd.storage import cache

logger = logging.getLogger(f"wmdd.{__name__}")


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
        # Whoever launched them reports them together.
        wanted = Selection([stage for stage in STAGES if stage != "report"])
        submitted = jobs = 0
        with progress(f"submitting {title}", len(runs), "runs") as advance:
            for config, folder in runs:
                if requested():
                    raise Interrupted(f"{submitted} runs are submitted; the same command submits the others")
                request = submit.prepare(config, folder, self._profile, selection=wanted)
                if request.arrays:
                    jobs += len(submit.submit(request))
                    submitted += 1
                advance(1)
        logger.info(
            f"{title}: {submitted} of {len(runs)} runs submitted, {jobs} jobs; the others are done or in the queue"
        )

    def job(self, ranks: int, module: str, arguments: Sequence[str], folder: Path) -> None:
        """Submit one job with what the profile asks for blocks, on as many nodes as the ranks fill, and wait."""
        import submitit
        from submitit.core.utils import FailedJobError, JobPaths

        wanted = self._profile.stages["distill"]
        per_node = min(ranks, wanted.ranks_per_node)
        if ranks % per_node:
            raise InputError(
                f"{ranks} ranks do not fill nodes of {per_node}; take a multiple, or change ranks_per_node"
            )
        wanted = wanted.model_copy(update={"nodes": ranks // per_node, "ranks_per_node": per_node})
        submit.private(folder / "job")
        executor = submitit.SlurmExecutor(folder / "job", max_num_timeout=1, python=submit.python(wanted))
        executor.update_parameters(**submit.parameters(f"wmdd-{ranks}-ranks", wanted, {"no-requeue": True}))
        environment = {"WMDD_CACHE": str(cache.cache_root().absolute())}
        with submit.clean_environment():
            job = executor.submit(Program(module, tuple(arguments), environment))
        logger.info(f"job {job.job_id}: {ranks} ranks on {wanted.nodes} nodes")
        while any(task.active for task in scheduler.queue([str(job.job_id)]).values()):
            time.sleep(scheduler.POLL_SECONDS)
        # Without accounting a job's end has no state, and submitit would wait for ever for a rank that left no result.
        for rank in range(ranks):
            paths = JobPaths(folder / "job", job.job_id, rank)
            if not paths.result_pickle.exists():
                said = paths.stdout.read_text() if paths.stdout.exists() else ""
                raise WmddError(f"job {job.job_id}: rank {rank} did not finish: {last_words(said)}")
        try:
            job.results()
        except FailedJobError as error:
            trace = str(error).partition("You can check")[0].strip("-\n ")
            raise WmddError(f"job {job.job_id} failed: {last_words(trace)}") from None
