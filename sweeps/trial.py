"""What one trial does: synthesise the proxy in stages, and judge the images after each by short students.

Teacher and class statistics come from the shared store, where ``prepare`` puts them once for all trials.
"""

import hashlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sweeps.format import Values
from sweeps.objective import SweepObjective
from sweeps.space import Budget, apply
from sweeps.trial_log import Report
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, decode_all, load_dataset
from wmdd.data.pixels import normalize, quantize
from wmdd.distill import blocks, statistics
from wmdd.distill import groups as groups_module
from wmdd.distill import job as job_module
from wmdd.distill.methods import base
from wmdd.distill.synthesis.engine import State
from wmdd.errors import InputError, Interrupted
from wmdd.networks.accuracy import Validation
from wmdd.records.scores import label_robust_score
from wmdd.runs import folder as folder_module
from wmdd.runs import partition
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime import progress_bars
from wmdd.runtime.placement import Placement
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import SINGLE
from wmdd.students import tasks, train
from wmdd.teacher.obtain import Teacher, get_or_train_teacher

Stop = Callable[[], bool]


@dataclass(frozen=True)
class SweepSetup:
    """All that the trials of a sweep have in common."""

    config: Config
    """As it stands: what is varied, before the budget"""
    budget: Budget
    objective: SweepObjective
    classes: tuple[str, ...] | None = None
    """Those of the proxy, if the budget takes a part of them"""
    references: dict[str, float] | None = None
    """What the label-robust score compares with, from ``prepare``"""

    def proxy(self, values: Values) -> Config:
        """Return the config of a trial: the values, then the budget's shares of what they say."""
        config = apply(self.config, values, "a trial")
        changes: dict[str, Any] = {
            "name": "trial",
            "blocks": 1,
            "data.holdout_per_class": self.budget.holdout_per_class,
            "synthesis.iterations": _amount(self.budget.iterations, config.synthesis.iterations),
            "student.epochs": _amount(self.budget.student_epochs, config.student.epochs),
            "student.seeds": self.budget.student_seeds,
            "student.baselines": (),
            "student.first_seed": 0,
            "student.views": ("epochs",),
        }
        if self.classes is not None:
            changes["data.classes"] = self.classes
        return apply(config, changes, "the budget")

    def probe(self, proxy: Config) -> Config:
        """Return the config of the students that judge intermediate images."""
        epochs = _amount(self.budget.probe_epochs, proxy.student.epochs)
        return apply(proxy, {"student.epochs": epochs, "student.seeds": self.budget.probe_seeds}, "the budget")

    def iterations(self, proxy: Config) -> list[int]:
        """Return after how many iterations a trial reports: the last time after all of them."""
        total, rungs = proxy.synthesis.iterations, self.budget.rungs
        return [max(1, round(total * self.budget.reduction ** (rung - rungs))) for rung in range(1, rungs + 1)]


def _amount(amount: int | float, whole: int) -> int:
    return amount if isinstance(amount, int) else max(1, round(amount * whole))


@dataclass(frozen=True)
class Bench:
    """What is opened once for a trial."""

    config: Config
    dataset: Dataset
    validation: Validation
    teacher: Teacher
    ranks: Ranks


def prepare(plan: SweepSetup, stop: Stop) -> SweepSetup:
    """Check the config and put the teacher and the class statistics into the store, once for all trials.

    Returns:
        the plan with what only the data tell: the classes of the proxy, and the references of the label-robust score.

    Raises:
        InputError: a class is too small, a network does not exist; nothing was started.
        Interrupted: a stop was requested.
    """
    if plan.budget.classes is not None:
        classes = load_dataset(plan.config.data).classes
        if plan.budget.classes > len(classes):
            raise InputError(f"budget.classes = {plan.budget.classes}: the config has {len(classes)} classes")
        plan = replace(plan, classes=classes[: plan.budget.classes])
    config = plan.proxy({})
    with ranks(config.compute, here=Placement()) as here:  # Ray may run in a step of several tasks
        dataset = load_dataset(config.data, config.compute.workers, here)
        tasks.check(config, len(dataset.classes))
        method = blocks.check(config, dataset)
        partition.plan(config, len(dataset.classes))
        bench = _open(config, dataset, here, stop)
        if method.uses_statistics:
            indices = range(len(dataset.classes))
            images = len(dataset.train)
            with progress_bars.progress("statistics, for all trials", images, "images") as advance:
                for _ in statistics.measure(config, dataset, bench.teacher, here, indices, advance, stop):
                    pass
        if plan.objective.name == "lrs":
            plan = replace(plan, references=_references(bench, stop))
    return plan


def run(plan: SweepSetup, values: Values, report: Callable[[Report], None], stop: Stop = lambda: False) -> None:
    """Do one trial, and report after every stage.

    Args:
        plan: of the sweep.
        values: of the trial.
        report: takes what was measured; may not return, if the scheduler stops the trial.
        stop: whether to leave.
    """
    # The first optimiser of a process imports the compiler: seconds that belong to no trial.
    importlib.import_module("torch._dynamo")
    begun = time.perf_counter()
    config = plan.proxy(values)
    with ranks(config.compute, here=Placement()) as here:  # Ray may run in a step of several tasks
        dataset = load_dataset(config.data, config.compute.workers, here)
        bench = _open(config, dataset, here, stop)
        synthesis = _Synthesis(bench, stop)
        stages = plan.iterations(config)
        for rung, iteration in enumerate(stages, start=1):
            synthesis.advance_to(iteration)
            found = synthesis.images()
            last = rung == len(stages)
            measured: Report = {"rung": rung, "iteration": iteration, "synthesis_seconds": round(synthesis.seconds, 3)}
            if last or plan.objective.students:
                measured |= _judge(config if last else plan.probe(config), bench, found, stop)
            if plan.references is not None:
                measured["lrs"] = label_robust_score(measured["hard"], measured["soft"], **plan.references)
            if last or plan.objective.key == "w2":
                measured["w2"] = _w2(bench, found)
            measured["seconds"] = round(time.perf_counter() - begun, 3)
            report(measured)


def _open(config: Config, dataset: Dataset, here: Ranks, stop: Stop) -> Bench:
    validation = Validation(config, dataset, here, stop)
    if validation.on != "holdout":
        raise InputError("a trial is judged on images held out of the training set: set budget.holdout_per_class")
    return Bench(config, dataset, validation, get_or_train_teacher(config, dataset, validation, here, stop), here)


class _Synthesis:
    """The groups of a distillation, advanced side by side, so that all classes stand at the same iteration."""

    def __init__(self, bench: Bench, stop: Stop) -> None:
        config, dataset = bench.config, bench.dataset
        self._bench, self._stop = bench, stop
        self._method: base.Method = blocks.check(config, dataset)
        self.seconds = 0.0
        """Spent on synthesis itself"""
        folder = folder_module.RunFolder(Path("unused"))  # nothing of a trial is written
        self._job = job_module.Job(config, dataset, bench.teacher, bench.ranks, folder, stop)
        (block,) = partition.plan(config, len(dataset.classes))
        classes = block.classes if self._method.uses_statistics else []
        found = dict(statistics.measure(config, dataset, bench.teacher, bench.ranks, classes))
        self._groups = [groups_module.prepare(self._job, self._method, group, found) for group in block.groups]
        self._states = [State(group.images) for group in self._groups]

    def advance_to(self, iteration: int) -> None:
        """Go on with every group until so many iterations are done."""
        begun = time.perf_counter()
        for index, group in enumerate(self._groups):
            self._states[index] = self._advanced(group, self._states[index], iteration)
        self.seconds += time.perf_counter() - begun

    def _advanced(self, group: groups_module.Prepared, state: State, until: int) -> State:
        done = state.iteration
        kept = state

        def advance(steps: int) -> None:
            nonlocal done
            done += steps

        def keep(reached: State) -> None:
            nonlocal kept
            kept = reached

        # A synthesis can be left where it can be checkpointed: that is how it pauses at a report.
        job = replace(self._job, stop=lambda: done >= until or self._stop())
        try:
            return groups_module.optimize(job, self._method, group, state, advance=advance, save=keep)
        except Interrupted:
            if self._stop():
                raise
            return kept

    def images(self) -> DistilledSet:
        """Return the images as they are, quantised as a block would be."""
        data, groups = self._bench.config.data, self._groups
        images = quantize(torch.cat([state.images for state in self._states]), data)
        labels = torch.cat([group.labels for group in groups])
        weights = torch.cat([group.weights.flatten() for group in groups])
        parts = [part.numpy().tobytes() for part in (images, labels, weights)]
        sha = hashlib.sha256(b"".join(parts)).hexdigest()
        return DistilledSet(images, labels, weights, self._bench.dataset.classes, data, sha)


def _students(
    config: Config, bench: Bench, distilled: DistilledSet, stop: Stop
) -> Iterator[tuple[tasks.StudentTask, float]]:
    with TemporaryDirectory() as labels:  # of regimes that store them; nobody reads them again
        for task in tasks.tasks(config.student, config.labels.regimes):
            result = train.train(
                config,
                task,
                distilled,
                bench.teacher,
                bench.validation,
                bench.ranks,
                team=SINGLE,
                folder=Path(labels),
                stop=stop,
            )
            yield task, result.metrics["top1"]


def _judge(config: Config, bench: Bench, distilled: DistilledSet, stop: Stop) -> Report:
    """Return top-1: the mean, that of each label regime, and that of each student seed."""
    found = list(_students(config, bench, distilled, stop))
    measured: Report = {
        regime: fmean(top1 for task, top1 in found if task.regime == regime) for regime in config.labels.regimes
    }
    seeds = [fmean(top1 for task, top1 in found if task.seed == seed) for seed in range(config.student.seeds)]
    return {"top1": fmean(seeds), **measured, "seeds": seeds}


def _w2(bench: Bench, distilled: DistilledSet) -> float:
    """Return W2² between the weighted images of a class and its held-out images in feature space, mean of classes."""
    from wmdd.distill.barycenter.solve import w2_squared

    holdout = bench.dataset.validation
    real = _features(bench, decode_all(holdout, bench.config, "decoding the holdout images"))
    made = _features(bench, distilled.images)
    found = []
    for index in range(len(bench.dataset.classes)):
        own = distilled.labels == index
        weights = distilled.weights[own].double()
        found.append(w2_squared(real[holdout.labels == index], made[own], weights / weights.sum()))
    return fmean(found)


def _features(bench: Bench, images: Tensor) -> Tensor:
    batches = (normalize(batch, bench.config.data) for batch in images.split(256))
    return torch.cat([bench.teacher.observe(batch, bench.ranks, len(batch)).features for batch in batches])


def _references(bench: Bench, stop: Stop) -> dict[str, float]:
    """Measure, on the hold-out, students of the whole training set (the teacher's recipe) and of random real images."""
    config = bench.config
    whole = []
    for network in config.student.networks:
        own = apply(config, {"teacher.network": network, "teacher.weights": None}, "the reference")
        teacher = get_or_train_teacher(
            own, bench.dataset, Validation(own, bench.dataset, bench.ranks), bench.ranks, stop
        )
        whole.append(float(teacher.facts["top1"]))
    chosen = apply(config, {"method": "random", "labels.regimes": ("soft",)}, "the reference")
    random = _Synthesis(replace(bench, config=chosen), stop).images()
    return {"real_hard": fmean(whole), "random_soft": _judge(chosen, bench, random, stop)["top1"]}
