"""Adapters for Ray Tune: trainable, searcher, scheduler, callback, stopper. Each calls the sweep's own code.

Ray is imported inside the functions, because ``ray_cluster`` must set its environment first.
"""

import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sweeps import trial
from sweeps.objective import SweepObjective
from sweeps.space import Budget
from sweeps.trial_log import Log, Report, Trial
from wmdd.errors import WmddError
from wmdd.storage import cache

_TIME_KEY = "share"
"""Key of ASHA's time: the share of its iterations that a trial has done, in units of the first report."""


def timed(report: Report, budget: Budget) -> Report:
    """Return a report with ASHA's time."""
    return {**report, _TIME_KEY: budget.reduction ** (report["rung"] - 1)}


_MEASURED = "measured"
"""Key of the list of keys that the trial itself reported; Ray adds other keys."""


_ERROR = "error"
"""Key of the error of a failed recipe. Every other end of a trial without its last report is a lost worker."""


def work(config: dict[str, Any], plan: trial.SweepSetup, gpus: float) -> None:
    """Do one trial in a Ray process, from its checkpoint if there is one.

    The recipe's own error is reported. An error of the machine ends the process, and Ray starts the trial elsewhere.

    Raises:
        WmddError: this node has no cache or no GPU.
    """
    from ray import tune

    _check_machine(plan)
    share_gpu_memory(gpus)

    def report(measured: Report) -> None:
        tune.report({**timed(measured, plan.budget), _MEASURED: list(measured)})

    plan = replace(plan, repeat=config["repeat"])
    try:
        trial.run(plan, config["values"], report, saved=Path(config["saved"]))
    except Exception as error:
        if is_fault_of_machine(error):
            raise
        tune.report({_ERROR: reason_of(error)})


def _check_machine(plan: trial.SweepSetup) -> None:
    import torch

    if not cache.cache_root().is_dir():
        raise WmddError(f"{cache.cache_root()}: is missing on this node; set WMDD_CACHE to a folder on a shared disk")
    if plan.config.compute.device == "cuda" and not torch.cuda.is_available():
        raise WmddError(f"torch sees no GPU on {platform.node()}, but the trial was given one; check its driver")


def is_fault_of_machine(error: BaseException) -> bool:
    """Return whether an error is one of the machine, such as a broken GPU or a full disk, and not of the recipe."""
    import torch

    broken = getattr(torch, "AcceleratorError", ())
    return isinstance(error, OSError | MemoryError | broken) or isinstance(error.__cause__, OSError)


def reason_of(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_CONTEXT_BYTES = 600 * 2**20
"""GPU memory of each process that PyTorch's allocator does not count: the CUDA context and the kernels."""


def memory_share(gpus: float, total: int) -> float | None:
    """Return the share of a GPU's memory that PyTorch may allocate in a trial; None without a neighbor.

    Args:
        gpus: GPUs of the trial, such as 0.25.
        total: memory of the GPU in bytes.
    """
    return max(gpus - _CONTEXT_BYTES / total, 0.01) if 0 < gpus < 1 else None


def share_gpu_memory(gpus: float) -> None:
    """Limit this process to its share of the GPU's memory, so that no trial takes the memory of its neighbors."""
    import torch

    if gpus and torch.cuda.is_available():
        share = memory_share(gpus, torch.cuda.get_device_properties(0).total_memory)
        if share is not None:
            torch.cuda.set_per_process_memory_fraction(share)


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
        time_attr=_TIME_KEY,
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
                asha.on_trial_result(None, stand_in, timed(report, budget))
            asha.on_trial_remove(None, stand_in)
    return asha


def searcher(
    todo: Iterable[int], suggest: Callable[[int], Mapping[str, object] | None], room: Callable[[], int]
) -> Any:
    """Return a searcher that starts the missing trials in order, as many at a time as there is room for.

    Args:
        todo: numbers of the missing trials.
        suggest: returns what a trial gets; None if there are no more trials.
        room: returns the number of concurrent trials. It grows when nodes join the cluster.
    """
    from ray.tune.search import Searcher

    class Queue(Searcher):
        """Returns the missing trials in order."""

        def __init__(self) -> None:
            super().__init__()
            self._waiting = iter(todo)
            self._running: set[str] = set()

        def suggest(self, trial_id: str) -> Any:
            if len(self._running) >= room():
                return None
            number = next(self._waiting, None)
            given = None if number is None else suggest(number)
            if given is None:
                return Searcher.FINISHED
            self._running.add(trial_id)
            return given

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            self._running.discard(trial_id)

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
            if _ERROR in result:
                known.state, known.error = "failed", result[_ERROR]
            if "rung" in result and len(known.reports) < result["rung"]:
                known.reports.append({key: result[key] for key in result[_MEASURED]})
                log.write(known)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            known = log.trials[trial.config["number"]]
            whole = len(known.reports) == rungs
            if known.state == "failed":
                self._close(known)
            elif whole or not stop():
                known.state = "done" if whole else "stopped"
                self._close(known)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            known = log.trials[trial.config["number"]]
            if not stop():  # the worker died, several times: the recipe is not to blame, and stays unfinished
                known.error = _reason(trial)
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
