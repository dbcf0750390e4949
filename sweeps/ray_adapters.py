"""What Ray Tune asks for: trainable, searcher, scheduler, callback, stopper.  Each hands over to the sweep's own.

Ray is imported inside, because its environment is set just before (``sweeps.cluster``).
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
"""What ASHA counts: the share of its own iterations that a trial has done, in units of the first report."""


def work(config: dict[str, Any], plan: trial.SweepSetup) -> None:
    """Do one trial in a process of Ray's."""
    from ray import tune

    if not cache.cache_root().is_dir():
        raise WmddError(f"{cache.cache_root()}: is not on this node; set WMDD_CACHE to a folder that all nodes share")
    scale = plan.budget.reduction

    def report(measured: Report) -> None:
        tune.report({**measured, _TIME: scale ** (measured["rung"] - 1)})

    trial.run(plan, config["values"], report)


def scheduler(kind: str, objective: SweepObjective, budget: Budget, trials: Sequence[Trial]) -> Any:
    """Return ASHA (Li et al. 2020), told of the trials that are already known, or a scheduler that stops none."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    class Asha(ASHAScheduler):
        """Lets trial 0 run to its end: it is what the others are compared with."""

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
        """Hands out the trials that are to be done, in order."""

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
    """Return a callback that keeps the log, and tells ``ended`` of each trial that ends."""
    from ray.tune import Callback

    class Recorder(Callback):
        """Writes every event of a trial into the log, unless it comes from the sweep's own end."""

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            known = log.trials[trial.config["number"]]
            if "rung" in result and len(known.reports) < result["rung"]:
                known.reports.append({key: result[key] for key in _REPORTED if key in result})
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


_REPORTED = ("rung", "iteration", "seconds", "synthesis_seconds", "top1", "hard", "soft", "seeds", "lrs", "w2")


def stopper(stop: Callable[[], bool]) -> Any:
    """Return what lets a signal end the sweep."""
    from ray.tune import Stopper

    class OnSignal(Stopper):
        """Ends the sweep when a signal asked for it."""

        def __call__(self, trial_id: str, result: Any) -> bool:
            return stop()

        def stop_all(self) -> bool:
            return stop()

    return OnSignal()


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _reason(failed: Any) -> str:
    """Return a trial's error in one line: the last of its trace, or the first of what Ray says about a dead process."""
    try:
        content = _COLOUR.sub("", Path(failed.error_file).read_text())
        lines = [line.strip() for line in content.splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    text = lines[1:]  # the first counts failures
    if not text:
        return "its process died"
    chosen = text[-1] if any("Traceback" in line or line.startswith("ray::") for line in text) else text[0]
    return re.sub(r"^(?:\w+\.)+(\w+: )", r"\1", chosen)
