"""A sweep: Ray Tune runs the trials, and JSON files keep their results."""

import logging
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sweeps import ray_adapters, search, trial
from sweeps.format import Values, show
from sweeps.objective import SweepObjective, objective_of, range_text, seeds_of
from sweeps.ray_cluster import TrialResources, check_address, check_local, ray_session
from sweeps.space import Space
from sweeps.space_file import load_space, parse_space
from sweeps.trial_log import Log, Trial
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.errors import InputError, Interrupted, WmddError, nearest
from wmdd.records.provenance import provenance
from wmdd.runtime.signals import stop_on

logger = logging.getLogger(f"wmdd.{__name__}")

Scheduler = Literal["asha", "none"]


@dataclass(frozen=True)
class Sweep:
    """The definition of a sweep: all that decides its trials and how they are judged."""

    config: Config
    space: Space
    objective: SweepObjective
    search: search.Kind
    scheduler: Scheduler
    seed: int

    def identity(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``."""
        return {
            "config": self.config.model_dump(mode="json"),
            "parameters": self.space.source["parameters"],
            "budget": self.space.budget.model_dump(mode="json"),
            "space": self.space.name,
            "objective": self.objective.name,
            "search": self.search,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "provenance": provenance(self.config.compute),
        }

    @staticmethod
    def from_identity(identity: Mapping[str, Any]) -> "Sweep":
        """Return the sweep of a folder, from the content of ``sweep.json``."""
        config = Config.model_validate(identity["config"])
        space = parse_space(identity["space"], {key: identity[key] for key in ("parameters", "budget")}, config)
        objective = objective_of(identity["objective"])
        return Sweep(config, space, objective, identity["search"], identity["scheduler"], identity["seed"])


def resolve(
    config: str,
    overrides: list[str],
    space: str,
    budget: Mapping[str, Any],
    objective: str,
    kind: str,
    scheduler: str,
    seed: int,
) -> Sweep:
    """Check the options of the command line, except those that depend on the machine.

    Raises:
        InputError: an option is wrong.
    """
    chosen = objective_of(objective)
    for option, given, valid in (
        ("--search", kind, get_args(search.Kind)),
        ("--scheduler", scheduler, get_args(Scheduler)),
    ):
        if given not in valid:
            raise InputError(f"{option} {given}: {nearest(given, list(valid))}")
    if chosen.name == "time" and scheduler == "asha":
        raise InputError(
            "--objective time: ASHA would compare seconds alone, and would stop accurate trials; use --scheduler none"
        )
    settings = load_config(config, overrides)
    if chosen.name == "lrs" and not {"hard", "soft"} <= set(settings.labels.regimes):
        raise InputError("--objective lrs: needs both kinds of labels: --set labels.regimes=['hard','soft']")
    return Sweep(settings, load_space(space, settings, budget), chosen, kind, scheduler, seed)  # type: ignore[arg-type]


def run(sweep: Sweep, out: Path, trials: int, resources: TrialResources, address: str | None = None) -> Log:
    """Run a sweep until it has ``trials`` trials. A stopped sweep resumes; a finished sweep gets further trials.

    Args:
        sweep: definition of the sweep.
        out: folder of the sweep.
        trials: total number of trials, including trial 0, the unchanged config.
        resources: CPUs and GPUs of each trial.
        address: address of a running Ray cluster; None starts Ray on this machine.

    Raises:
        InputError: the folder belongs to another sweep, or a trial needs more CPUs or GPUs than there are.
        Interrupted: a signal requested a stop. The same command resumes the sweep.
        WmddError: every trial failed.
    """
    if trials < 1:
        raise InputError(f"--trials {trials}: a sweep has at least one trial")
    if address is None:
        check_local(resources)
    else:
        check_address(address)
    if sweep.search == "grid" and trials > (most := len(sweep.space.grid()) + 1):
        logger.info(f"the grid has {most - 1} combinations: {most} trials with the unchanged config")
        trials = most
    log = Log(out)
    with log.held(sweep.identity()), stop_on(signal.SIGTERM, signal.SIGINT) as stop:
        todo = [known.number for known in log.trials if not known.finished]
        todo += range(len(log.trials), trials)
        if todo:
            _say_plan(sweep, log, todo, trials)
            # Inside a trial, Ray shows only the trial's GPUs, numbered from 0.
            placed = sweep.config.replace({"compute.device": "auto" if resources.gpus else "cpu"}, "the sweep")
            plan = trial.prepare(trial.SweepSetup(placed, sweep.space.budget, sweep.objective), stop)
            if resources.gpus:  # a trial that misses its GPU must fail, not take hours on the CPU
                plan = replace(plan, config=placed.replace({"compute.device": "cuda"}, "the sweep"))
            _clear(out)
            try:
                with ray_session(out, resources, address) as concurrent:
                    _fit(sweep, plan, log, todo, resources, concurrent, stop)
            finally:
                _clear(out)
        if stop():
            left = sum(number >= len(log.trials) or not log.trials[number].finished for number in todo)
            raise Interrupted(
                f"{out}: stopped with {left} of {trials} trials to do; the same command resumes the sweep"
            )
    if all(known.state == "failed" for known in log.trials):
        raise WmddError(f"{out}: every trial failed; the first: {log.trials[0].error}")
    return log


def _clear(out: Path) -> None:
    shutil.rmtree(out / "ray", ignore_errors=True)


def _say_plan(sweep: Sweep, log: Log, todo: list[int], trials: int) -> None:
    known = f", {len(log.trials) - sum(not t.finished for t in log.trials)} are done" if log.trials else ""
    logger.info(
        f"sweep of {sweep.config.name}: {trials} trials over {sweep.space.name}{known}; {sweep.search},"
        f" scheduler {sweep.scheduler}, objective {sweep.objective.name}: {sweep.objective.meaning}"
    )


def _fit(
    sweep: Sweep,
    plan: trial.SweepSetup,
    log: Log,
    todo: list[int],
    resources: TrialResources,
    concurrent: int,
    stop: Callable[[], bool],
) -> None:
    from ray import tune

    def suggest(number: int) -> Values | None:
        if number < len(log.trials):
            values = log.trials[number].values  # the trial was running when the sweep stopped
        elif number == 0:
            values = sweep.space.values_in(sweep.config)
        else:
            found = search.suggest(sweep.space, sweep.search, sweep.seed, sweep.objective, number, log.trials)
            if found is None:
                return None
            values = found
        log.write(Trial(number, values))
        return values

    def ended(known: Trial) -> None:
        logger.info(_line(sweep, known))

    trainable = tune.with_parameters(ray_adapters.work, plan=plan)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=ray_adapters.searcher(todo, suggest),
            scheduler=ray_adapters.scheduler(sweep.scheduler, sweep.objective, sweep.space.budget, log.trials),
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(log.path.absolute()),
            callbacks=[ray_adapters.recorder(log, sweep.space.budget.rungs, stop, ended)],
            stop=ray_adapters.stopper(stop),
            verbose=0,
        ),
    )
    tuner.fit()


def _line(sweep: Sweep, known: Trial) -> str:
    values = ", ".join(f"{key.rpartition('.')[2]} {show(value)}" for key, value in known.values.items())
    if known.state == "failed":
        return f"trial {known.number}: failed: {known.error} ({values})"
    worth = known.last.get(sweep.objective.key)
    reached = "" if worth is None else f" {sweep.objective.name} {sweep.objective.text(worth)}"
    if sweep.objective.name == "top1" and len(seeds_of(known)) > 1:
        reached += f" (students {range_text(seeds_of(known))})"
    ended = "" if known.state == "done" else f" stopped after {known.last.get('iteration', 0)} iterations:"
    return f"trial {known.number}:{ended}{reached} in {known.seconds:.1f} s ({values})"
