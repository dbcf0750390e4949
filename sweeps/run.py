"""A sweep: Ray Tune runs the trials, and JSON files keep their results."""

import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sweeps import search, trial
from sweeps.fit import Job, check_resources, fit
from sweeps.format import Values
from sweeps.objective import SweepObjective, objective_of
from sweeps.ray_cluster import TrialResources
from sweeps.space import Space
from sweeps.space_file import load_space, parse_space
from sweeps.trial_log import Log
from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.errors import InputError, WmddError, nearest
from wmdd.records.provenance import provenance
from wmdd.runtime.signals import stop_on

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def run(
    sweep: Sweep,
    out: Path,
    trials: int,
    resources: TrialResources,
    address: str | None = None,
    table: "Callable[[Log], RenderableType] | None" = None,
) -> Log:
    """Run a sweep until it has ``trials`` trials. A stopped sweep resumes; a finished sweep gets further trials.

    Args:
        sweep: definition of the sweep.
        out: folder of the sweep.
        trials: total number of trials, including trial 0, the unchanged config.
        resources: CPUs and GPUs of each trial.
        address: address of a running Ray cluster; None starts Ray on this machine.
        table: returns the table that a terminal shows while trials run.

    Raises:
        InputError: the folder belongs to another sweep, or a trial needs more CPUs or GPUs than there are.
        Interrupted: a signal requested a stop. The same command resumes the sweep.
        WmddError: every trial failed.
    """
    if trials < 1:
        raise InputError(f"--trials {trials}: a sweep has at least one trial")
    check_resources(resources, address)
    if sweep.search == "grid" and trials > (most := len(sweep.space.grid()) + 1):
        logger.info(f"the grid has {most - 1} combinations: {most} trials with the unchanged config")
        trials = most
    log = Log(out)

    def suggest(number: int) -> Values | None:
        if number == 0:
            return sweep.space.values_in(sweep.config)
        return search.suggest(sweep.space, sweep.search, sweep.seed, sweep.objective, number, log.trials)

    with log.held(sweep.identity()), stop_on(signal.SIGTERM, signal.SIGINT) as stop:
        todo = [known.number for known in log.trials if not known.finished]
        todo += range(len(log.trials), trials)
        setup = trial.SweepSetup(sweep.config, sweep.space.budget, sweep.objective)
        if todo:
            _say_plan(sweep, log, trials)
        fit(Job(setup, log, todo, suggest, sweep.scheduler, trials, table), resources, address, stop)
    if all(known.state == "failed" for known in log.trials):
        raise WmddError(f"{out}: every trial failed; the first: {log.trials[0].error}")
    return log


def _say_plan(sweep: Sweep, log: Log, trials: int) -> None:
    known = f", {len(log.trials) - sum(not t.finished for t in log.trials)} are done" if log.trials else ""
    logger.info(
        f"sweep of {sweep.config.name}: {trials} trials over {sweep.space.name}{known}; {sweep.search},"
        f" scheduler {sweep.scheduler}, objective {sweep.objective.name}: {sweep.objective.meaning}"
    )
