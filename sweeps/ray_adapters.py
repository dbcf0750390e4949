"""Adapters for Ray Tune: trainable, searcher, scheduler, callback, stopper. Each calls the sweep's own code.

Ray is imported inside the functions, because ``ray_cluster`` must set its environment first.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sweeps import trial
from sweeps.format import Values
from sweeps.objective import SweepObjective
from sweeps.space import Budget
from sweeps.trial_log import Log, Report, Trial
from wmdd.errors import WmddError
from wmdd.storage import cache

_TIME = "share"
"""ASHA's time: the share of its iterations that a trial has done, in units of the first report."""


_MEASURED = "measured"
"""Key of the list of keys that the trial itself reported; Ray adds other keys."""


def work(config: dict[str, Any], plan: trial.SweepSetup) -> None:
    """Do one trial in a Ray process."""
    from ray import tune

    if not cache.cache_root().is_dir():
        raise WmddError(f"{cache.cache_root()}: is missing on this node; set WMDD_CACHE to a folder on a shared disk")
    scale = plan.budget.reduction

    def report(measured: Report) -> None:
        tune.report({**measured, _TIME: scale ** (measured["rung"] - 1), _MEASURED: list(measured)})

    trial.run(plan, config["values"], report)


def scheduler(kind: str, objective: SweepObjective, budget: Budget, trials: Sequence[Trial]) -> Any:
    """Return ASHA (Li et al. 2020), with the reports of earlier trials, or a scheduler that stops no trial."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    class Asha(ASHAScheduler):
        """ASHA that never stops trial 0, with which the others are compared."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
            action: str = super().on_trial_result(tune_controller, trial, result)
            return TrialScheduler.CONTINUE if trial.config["number"] == 0 else action

    if kind == "none":
        return FIFOScheduler()
    asha: Any = Asha(
        time_attr=_TIME,
        metric=objective.key,
        mode=objective.mode,
        max_t=budget.reduction ** (budget.rungs - 1),
        grace_period=1,
        reduction_factor=budget.reduction,
    )
    for known in trials:
        if known.finished:
            stand_in = SimpleNamespace(trial_id=f"known-{known.number}", config={"number": known.number})
            asha.on_trial_add(None, stand_in)
            for report in known.reports:
                asha.on_trial_result(None, stand_in, {**report, _TIME: budget.reduction ** (report["rung"] - 1)})
            asha.on_trial_remove(None, stand_in)
    return asha


def searcher(todo: Iterable[int], suggest: Callable[[int], Values | None]) -> Any:
    """Return a searcher that asks ``suggest`` for the values of each trial in turn."""
    from ray.tune.search import Searcher

    class Queue(Searcher):
        """Returns the missing trials in order."""

        def __init__(self) -> None:
            super().__init__()
            self._waiting = iter(todo)

        def suggest(self, trial_id: str) -> Any:
            number = next(self._waiting, None)
            values = None if number is None else suggest(number)
            return Searcher.FINISHED if values is None else {"number": number, "values": values}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Queue()


def recorder(log: Log, rungs: int, stop: Callable[[], bool], ended: Callable[[Trial], None]) -> Any:
    """Return a callback that writes the log, and calls ``ended`` for each trial that ends."""
    from ray.tune import Callback

    class Recorder(Callback):
        """Writes every event of a trial to the log, except those caused by stopping the sweep."""

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            known = log.trials[trial.config["number"]]
            if "rung" in result and len(known.reports) < result["rung"]:
                known.reports.append({key: result[key] for key in result[_MEASURED]})
                log.write(known)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            known = log.trials[trial.config["number"]]
            whole = len(known.reports) == rungs
            if whole or not stop():
                known.state = "done" if whole else "stopped"
                self._close(known)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            known = log.trials[trial.config["number"]]
            if not stop():
                known.state, known.error = "failed", _reason(trial)
                self._close(known)

        def _close(self, known: Trial) -> None:
            log.write(known)
            ended(known)

    return Recorder()


def stopper(stop: Callable[[], bool]) -> Any:
    """Return a stopper that ends the sweep after a signal."""
    from ray.tune import Stopper

    class OnSignal(Stopper):
        """Ends the sweep after a stop request."""

        def __call__(self, trial_id: str, result: Any) -> bool:
            return stop()

        def stop_all(self) -> bool:
            return stop()

    return OnSignal()


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _reason(failed: Any) -> str:
    """Return a trial's error in one line: the last of the traceback, or the first of Ray's message on a crash."""
    try:
        content = _COLOUR.sub("", Path(failed.error_file).read_text())
        lines = [line.strip() for line in content.splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    text = lines[1:]  # the first line counts failures
    if not text:
        return "its process died"
    chosen = text[-1] if any("Traceback" in line or line.startswith("ray::") for line in text) else text[0]
    return re.sub(r"^(?:\w+\.)+(\w+: )", r"\1", chosen)
