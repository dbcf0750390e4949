"""Ray Tune runs trials, and a log keeps their results."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from sweeps import ray_adapters, trial
from sweeps.format import Values, show
from sweeps.objective import SweepObjective, range_text, seeds_of
from sweeps.ray_cluster import TrialResources, check_address, check_local, ray_session
from sweeps.trial_log import Log, Trial
from wmdd.errors import Interrupted, WmddError
from wmdd.runtime.log import console, shows_progress

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(f"wmdd.{__name__}")

MAX_LOST_WORKERS = 2
"""Times that a trial is started again in one command after its worker died."""


@dataclass(frozen=True)
class Job:
    """The trials that one command runs."""

    setup: trial.SweepSetup
    """Setup of the trials, without what ``trial.prepare`` adds"""
    log: Log
    """Log of the trials, held by this process"""
    todo: Sequence[int]
    """Numbers of the trials to run, in order"""
    suggest: Callable[[int], Values | None]
    """Returns the values of a trial that is not in the log; None if there are no more"""
    scheduler: str
    """``asha`` or ``none``"""
    total: int
    """Number of trials when all is done"""
    table: Callable[[Log], "RenderableType"] | None = None
    """Returns the table that a terminal shows while trials run"""


def fit(job: Job, resources: TrialResources, address: str | None, stop: Callable[[], bool]) -> None:
    """Run the trials of a job.

    Raises:
        InputError: a trial needs more CPUs or GPUs than there are, or the config is wrong.
        Interrupted: a stop was requested; the same command resumes.
        WmddError: the workers of some trials died again and again. These trials are no failed recipes.
    """
    log, todo = job.log, job.todo
    if todo:
        # Inside a trial, Ray shows only the trial's GPUs, numbered from 0.
        config = job.setup.config.replace({"compute.device": "auto" if resources.gpus else "cpu"}, "the sweep")
        plan = trial.prepare(replace(job.setup, config=config), stop)
        if resources.gpus:  # a trial that misses its GPU must not take hours on the CPU
            plan = replace(plan, config=config.replace({"compute.device": "cuda"}, "the sweep"))
        _clear(log)
        try:
            with ray_session(log.path, resources, address) as room:
                logger.info(cost_text(len(todo), _trial_seconds(job, plan, resources, stop), room(), resources))
                with _live_table(job) as refresh:
                    _tune(job, plan, resources, room, stop, refresh)
        finally:
            _clear(log)
    left = [number for number in todo if number >= len(log.trials) or not log.trials[number].finished]
    if stop():
        raise Interrupted(
            f"{log.path}: stopped with {len(left)} of {job.total} trials to do; the same command resumes the sweep"
        )
    lost = [log.trials[number] for number in left if number < len(log.trials) and log.trials[number].error]
    if lost:
        raise WmddError(
            f"{log.path}: {len(lost)} of {job.total} trials lost their worker; trial {lost[0].number}: {lost[0].error};"
            " the same command runs them again"
        )


def check_resources(resources: TrialResources, address: str | None) -> None:
    """Check that a trial fits on this machine, or that a cluster answers.

    Raises:
        InputError: a trial needs more CPUs or GPUs than there are, or no cluster answers.
    """
    if address is None:
        check_local(resources)
    else:
        check_address(address)


def _clear(log: Log) -> None:
    shutil.rmtree(log.path / "ray", ignore_errors=True)


def _trial_seconds(
    job: Job, plan: trial.SweepSetup, resources: TrialResources, stop: Callable[[], bool]
) -> tuple[float, str] | None:
    """Return the seconds of a trial and where they are from; None if this machine cannot measure them."""
    import torch

    if done := [known.seconds for known in job.log.trials if known.state == "done"]:
        return fmean(done), f"mean of {len(done)} complete trials"
    if resources.gpus and not torch.cuda.is_available():
        return None
    return trial.estimate_seconds(plan, stop), "estimated from a few steps"


def cost_text(count: int, known: tuple[float, str] | None, room: int, resources: TrialResources) -> str:
    """Return what a command will take: number of trials, hours, and GPU-hours or CPU-hours."""
    together = min(room, count)
    head = f"{count} trials to do, {together} at a time"
    if known is None:
        return f"{head}; the hours are known after the first trial"
    seconds, source = known
    amount, unit = (resources.gpus, "GPU-hours") if resources.gpus else (resources.cpus, "CPU-hours")
    hours = count * seconds / 3600
    return f"{head}; {seconds:.3g} s each ({source}): at most {hours / together:.2g} h and {amount * hours:.2g} {unit}"


@contextmanager
def _live_table(job: Job) -> Iterator[Callable[[], None]]:
    """Show the table of a job below the messages, on a terminal; yields a function that refreshes it."""
    table = job.table
    if table is None or not shows_progress():
        yield lambda: None
        return
    from rich.live import Live

    with Live(table(job.log), console=console, auto_refresh=False, transient=True) as live:
        yield _Unsaved(lambda: live.update(table(job.log), refresh=True))


class _Unsaved:
    """A call that Ray leaves out when it saves its callbacks to a file: a terminal cannot be saved."""

    def __init__(self, call: Callable[[], None] = lambda: None) -> None:
        self._call = call

    def __call__(self) -> None:
        self._call()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _tune(
    job: Job,
    plan: trial.SweepSetup,
    resources: TrialResources,
    room: Callable[[], int],
    stop: Callable[[], bool],
    refresh: Callable[[], None],
) -> None:
    from ray import tune

    log = job.log

    def suggest(number: int) -> Mapping[str, object] | None:
        known = log.trials[number] if number < len(log.trials) else None  # it was running when the sweep stopped
        if known is None:
            values = job.suggest(number)
            if values is None:
                return None
            known = Trial(number, values)
        else:
            known = Trial(number, known.values, of=known.of, repeat=known.repeat)
        log.write(known)
        saved = str(log.checkpoint(number).absolute())
        return {"number": number, "values": known.values, "repeat": known.repeat, "saved": saved}

    def ended(known: Trial) -> None:
        logger.info(line(plan.objective, known))
        if known.finished:
            log.checkpoint(known.number).unlink(missing_ok=True)
        refresh()

    trainable = tune.with_parameters(ray_adapters.work, plan=plan, gpus=resources.gpus)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=ray_adapters.searcher(job.todo, suggest, room),
            scheduler=ray_adapters.scheduler(job.scheduler, plan.objective, plan.budget, log.trials),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(log.path.absolute()),
            callbacks=[ray_adapters.recorder(log, plan.budget.rungs, stop, ended)],
            failure_config=tune.FailureConfig(max_failures=MAX_LOST_WORKERS),
            stop=ray_adapters.stopper(stop),
            verbose=0,
        ),
    )
    tuner.fit()


def line(objective: SweepObjective, known: Trial) -> str:
    """Return one line about a trial that has ended."""
    values = ", ".join(f"{key.rpartition('.')[2]} {show(value)}" for key, value in known.values.items())
    name = f"trial {known.number}" if known.of is None else f"trial {known.of} with seeds {known.repeat}"
    if known.state == "failed":
        return f"{name}: failed: {known.error} ({values})"
    if not known.finished:
        return f"{name}: lost its worker: {known.error}; it will run again ({values})"
    worth = known.last.get(objective.key)
    reached = "" if worth is None else f" {objective.name} {objective.text(worth)}"
    if objective.name == "top1" and len(seeds_of(known)) > 1:
        reached += f" (students {range_text(seeds_of(known))})"
    ended = "" if known.state == "done" else f" stopped after {known.last.get('iteration', 0)} iterations:"
    return f"{name}:{ended}{reached} in {known.seconds:.1f} s ({values})"
