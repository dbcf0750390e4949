"""What early stopping would have done: a complete log of a sweep, replayed with ASHA and other orders of the trials."""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from sweeps.objective import SweepObjective
from sweeps.ray_adapters import scheduler, timed
from sweeps.space import Budget
from sweeps.trial_log import Trial
from wmdd.errors import InputError


@dataclass(frozen=True)
class Replay:
    """One replay of a log."""

    stopped: int
    """Number of trials that ASHA stopped"""
    saved: float
    """Share of the seconds of all trials that ASHA saved"""
    kept: bool
    """Whether the best trial of the complete log ran to its end"""
    loss: float
    """Objective that the best complete trial of the replay loses against the best of the log; 0 if ``kept``"""


def replay(
    trials: Sequence[Trial], objective: SweepObjective, budget: Budget, seed: int, concurrent: int = 1
) -> Replay:
    """Replay a log in which every trial ran to its end, without any training.

    Trial 0 comes first, the others in a random order. Each report comes after the seconds that it took in the log.
    The decisions are those of the scheduler of ``wmdd sweep run``.

    Args:
        trials: trials of a sweep with ``--scheduler none``. Failed trials are left out.
        objective: objective of the sweep.
        budget: budget of the sweep.
        seed: seed of the order.
        concurrent: number of trials at the same time.

    Raises:
        InputError: a trial is not complete, or there are fewer than two.
    """
    known = [trial for trial in trials if trial.state != "failed"]
    if len(known) < 2 or any(trial.state != "done" or len(trial.reports) != budget.rungs for trial in known):
        raise InputError("a replay needs a log in which every trial ran to its end: --scheduler none")
    later = known[1:]
    random.Random(seed).shuffle(later)
    waiting, asha = [known[0], *later], scheduler("asha", objective, budget, [])
    running: list[tuple[float, int, int]] = []  # time of the next report, order of the trial, its report
    order: list[tuple[Trial, SimpleNamespace]] = []
    spent, survivors = 0.0, []

    def start(now: float) -> None:
        trial = waiting.pop(0)
        stand_in = SimpleNamespace(trial_id=f"trial-{trial.number}", config={"number": trial.number})
        asha.on_trial_add(None, stand_in)
        order.append((trial, stand_in))
        heapq.heappush(running, (now + trial.reports[0]["seconds"], len(order) - 1, 0))

    for _ in range(min(concurrent, len(waiting))):
        start(0.0)
    while running:
        now, place, index = heapq.heappop(running)
        trial, stand_in = order[place]
        report = trial.reports[index]
        result = timed(report, budget)
        last = index + 1 == budget.rungs
        if not last and asha.on_trial_result(None, stand_in, result) == "CONTINUE":
            heapq.heappush(running, (now + trial.reports[index + 1]["seconds"] - report["seconds"], place, index + 1))
            continue
        if last:
            asha.on_trial_complete(None, stand_in, result)
            survivors.append(trial)
        else:
            asha.on_trial_remove(None, stand_in)
        spent += report["seconds"]
        if waiting:
            start(now)
    best, found = objective.best(known), objective.best([known[0], *(one for one in survivors if one is not known[0])])
    if best is None or found is None:
        raise InputError("a replay needs trials with a value of the objective")
    loss = abs(objective.value(best, known) - objective.value(found, known))
    return Replay(len(known) - len(survivors), 1 - spent / sum(one.seconds for one in known), best in survivors, loss)
