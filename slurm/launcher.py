"""The launcher ``slurm`` (entry point of ``wmdd.launchers``): whole runs as graphs of arrays, jobs of many ranks."""

import logging
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import scheduler, submit
from slurm.plan import Selection
from slurm.profile import STAGES, Profile, Resources, load_profile
from slurm.task import RANK_VARIABLES
from wmdd.config.schema import Config
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.launchers import Launcher, Step, last_words
from wmdd.runtime.placement import SECRET_VARIABLE
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.signals import requested
from wmdd.storage import cache
from wmdd.storage.files import read_json, write_json

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
        # The command that launched them reports them together.
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

    def run_steps(self, steps: Sequence[Step], folder: Path) -> None:
        """Run the steps in one job, on the nodes that the largest one fills; a job that is in the queue is waited for.

        Every step begins at the first node, so all of them measure the same nodes.
        """
        missing = [step for step in steps if not step.is_done()]
        if not missing:
            return
        mark = folder / "job.json"
        known = str(read_json(mark)["job"]) if mark.exists() else ""
        if not known or not _active(known):
            submit.private(folder / "job")
            script = study_script(self._profile, missing, folder)
            known = submit.send(script)
            write_json(mark, {"job": known})
        logger.info(f"job {known}: {len(missing)} steps, the largest of {max(step.ranks for step in missing)} ranks")
        pause = 1.0
        while _active(known):
            if requested():
                raise Interrupted(f"job {known} goes on without this command; the same command waits for it again")
            time.sleep(pause)
            pause = min(2 * pause, scheduler.POLL_SECONDS)
        if lost := [step for step in missing if not step.is_done()]:
            logs = [lost[0].folder / "log.txt", folder / "job" / f"{known}_0_log.out"]
            said = next((log.read_text(errors="replace") for log in logs if log.exists()), "")
            raise WmddError(
                f"job {known}: {len(lost)} of {len(missing)} steps are not done: {last_words(said)}; the same command"
                " runs only these"
            )


def _active(job: str) -> bool:
    return any(task.active for task in scheduler.queue([job]).values())


def nodes_of(profile: Profile, ranks: int) -> tuple[int, int]:
    """Return the number of nodes that some ranks fill, and the ranks on each.

    Raises:
        InputError: they do not fill whole nodes.
    """
    whole = profile.node_ranks or profile.stages["distill"].ranks_per_node
    each = min(ranks, whole)
    if ranks % each:
        raise InputError(f"{ranks} ranks do not fill nodes of {each}; take a multiple, or change node_ranks")
    return ranks // each, each


def study_script(profile: Profile, steps: Sequence[Step], folder: Path) -> str:
    """Return the script of a job that runs steps one after the other; steps that are done are left out when it starts.

    Raises:
        InputError: the ranks of a step do not fill whole nodes.
    """
    nodes, each = max(nodes_of(profile, step.ranks) for step in steps)
    one = profile.stages["distill"]
    wanted = one.model_copy(
        update={
            "nodes": nodes,
            "ranks_per_node": each,
            "memory_gb": one.memory_gb * each / one.ranks_per_node,
        }
    )
    lines = [*environment_lines(one), *(_step_line(profile, step) for step in steps)]
    return submit.job_script("wmdd-scaling", wanted, lines, folder / "job", requeue=True)


def environment_lines(wanted: Resources) -> list[str]:
    """Return the shell lines that give a job the cache of this process, a secret and the variables of the profile."""
    exports = [f"export WMDD_CACHE={shlex.quote(str(cache.cache_root().absolute()))}"]
    # Made on the node: others may read the script of a job.
    exports += [f"export {SECRET_VARIABLE}=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')"]
    exports += [f"export {key}={_expanded(value)}" for key, value in wanted.env.items()]
    return [f"unset {' '.join(RANK_VARIABLES)}", *exports]


def _expanded(value: str) -> str:
    """Return a word of a shell script in which ``$NAME`` alone is replaced."""
    quoted = re.sub(r'[\\"`]|\$(?![A-Za-z_{])', lambda found: "\\" + found[0], value)
    return f'"{quoted}"'


def _step_line(profile: Profile, step: Step) -> str:
    """Return the line of a job's script that runs a step, unless all of its ranks have written their files."""
    wanted, (nodes, each) = profile.stages["distill"], nodes_of(profile, step.ranks)
    gpus = [f"--gpus-per-node={each * wanted.gpus_per_rank}"] if wanted.gpus_per_rank else []
    command = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={step.ranks}",
        f"--ntasks-per-node={each}",
        "--relative=0",
        "--exact",
        "--mem=0",
        "--kill-on-bad-exit=1",
        f"--cpus-per-task={wanted.cpus_per_rank}",
        f"--output={step.folder / 'log.txt'}",
        *gpus,
        *wanted.srun_args,
    ]
    words = shlex.join([*command, *shlex.split(submit.python(wanted)), "-u", "-m", step.module, *step.arguments])
    files = shlex.quote(str(step.folder)) + "/rank-*.json"
    return f'[ "$(ls {files} 2> /dev/null | wc -l)" -eq {step.ranks} ] || {words} || exit'
