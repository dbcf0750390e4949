"""One trial: synthesize the proxy in stages, and judge the images after each stage with short students.

Teacher and class statistics come from the shared cache. ``prepare`` writes them there once, for all trials.
"""

import hashlib
import importlib
import json
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
from sweeps.space import Budget
from sweeps.trial_log import Report
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, load_dataset
from wmdd.data.pixels import normalize, quantize
from wmdd.distill import blocks, statistics
from wmdd.distill.groups import optimize
from wmdd.distill.groups import prepare as prepare_group
from wmdd.distill.synthesis.engine import State
from wmdd.errors import InputError
from wmdd.networks.accuracy import Validation
from wmdd.networks.checkpoint import StopCheck, marked
from wmdd.records.scores import label_robust_score
from wmdd.runs import class_partition
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime import progress_bars
from wmdd.runtime.placement import Placement
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.team import SINGLE
from wmdd.session import Session, open_session
from wmdd.storage.files import digest, read_metadata, read_tensors, write_tensors
from wmdd.students import tasks, train

Stop = Callable[[], bool]


@dataclass(frozen=True)
class SweepSetup:
    """What the trials of a sweep have in common."""

    config: Config
    """Config to vary, without the budget"""
    budget: Budget
    objective: SweepObjective
    classes: tuple[str, ...] | None = None
    """Classes of the proxy, if the budget names a number of classes; None for all"""
    references: dict[str, float] | None = None
    """Reference accuracies of the label-robust score, from ``prepare``; None for other objectives"""
    repeat: int = 0
    """0: the sweep's own seeds. 1, 2, ...: fresh seeds of the distillation and of the students (a confirmation)"""

    def proxy(self, values: Values) -> Config:
        """Return the config of a trial: the config with the trial's values, scaled to the budget."""
        config = self.config.replace(values, "a trial")
        changes: dict[str, Any] = {
            "name": "trial",
            "seed": config.seed + self.repeat,
            "blocks": 1,
            "data.holdout_per_class": self.budget.holdout_per_class,
            "synthesis.iterations": _amount(self.budget.iterations, config.synthesis.iterations),
            "student.epochs": _amount(self.budget.student_epochs, config.student.epochs),
            "student.seeds": self.budget.student_seeds,
            "student.baselines": (),
            "student.first_seed": self.repeat * self.budget.student_seeds,
            "student.validate_every": 0,
            "student.views": ("epochs",),
        }
        if self.classes is not None:
            changes["data.classes"] = self.classes
        return config.replace(changes, "the budget")

    def probe(self, proxy: Config) -> Config:
        """Return the config of the students that judge intermediate images."""
        epochs = _amount(self.budget.probe_epochs, proxy.student.epochs)
        return proxy.replace({"student.epochs": epochs, "student.seeds": self.budget.probe_seeds}, "the budget")

    def iterations(self, proxy: Config) -> list[int]:
        """Return the iterations after which a trial reports. The last report comes after all of them."""
        total, rungs = proxy.synthesis.iterations, self.budget.rungs
        return [max(1, round(total * self.budget.reduction ** (rung - rungs))) for rung in range(1, rungs + 1)]


def _amount(amount: int | float, whole: int) -> int:
    return amount if isinstance(amount, int) else max(1, round(amount * whole))


def prepare(plan: SweepSetup, stop: Stop) -> SweepSetup:
    """Check the config, and write the teacher and the class statistics to the cache, once for all trials.

    Returns:
        The setup, completed from the dataset: the classes of the proxy, and the references of the label-robust score.

    Raises:
        InputError: a class has too few images, or a network does not exist. No trial was started.
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
        class_partition.plan(config, len(dataset.classes))
        session = _open(config, dataset, here, stop)
        session.validation.reader()
        if method.uses_statistics:
            indices = range(len(dataset.classes))
            images = len(dataset.train)
            with progress_bars.progress("statistics, for all trials", images, "images") as advance:
                for _ in statistics.measure(session, indices, advance):
                    pass
        if plan.objective.name == "lrs":
            plan = replace(plan, references=_references(session))
    return plan


def run(
    plan: SweepSetup,
    values: Values,
    report: Callable[[Report], None],
    stop: Stop = lambda: False,
    saved: Path | None = None,
) -> None:
    """Do one trial, and report after every stage.

    Args:
        plan: setup of the sweep.
        values: values of the trial.
        report: called with the results of each stage. It may not return, if the scheduler stops the trial. A resumed
            trial first repeats the reports of its checkpoint.
        stop: whether a stop was requested.
        saved: checkpoint file, written after each stage but the last; None for no checkpoints.
    """
    # The first optimizer of a process imports the compiler, which must not count as time of the trial.
    importlib.import_module("torch._dynamo")
    begun = time.perf_counter()
    config = plan.proxy(values)
    with ranks(config.compute, here=Placement()) as here:  # Ray may run in a step of several tasks
        dataset = load_dataset(config.data, config.compute.workers, here)
        session = _open(config, dataset, here, stop)
        synthesis = _Synthesis(session)
        stages = plan.iterations(config)
        reports = synthesis.restore(saved) if saved else []
        before = reports[-1]["seconds"] if reports else 0.0
        for known in reports:
            report(known)
        for rung, iteration in list(enumerate(stages, start=1))[len(reports) :]:
            synthesis.advance_to(iteration)
            found = synthesis.images()
            last = rung == len(stages)
            measured: Report = {"rung": rung, "iteration": iteration, "synthesis_seconds": round(synthesis.seconds, 3)}
            if last or plan.objective.students:
                measured |= _judge(replace(session, config=config if last else plan.probe(config)), found)
            if plan.references is not None:
                measured["lrs"] = label_robust_score(measured["hard"], measured["soft"], **plan.references)
            if last or plan.objective.key == "w2":
                measured["w2"] = _w2(session, found)
            measured["seconds"] = round(before + time.perf_counter() - begun, 3)
            reports.append(measured)
            if saved and not last:
                synthesis.save(saved, reports)
            report(measured)


def estimate_seconds(plan: SweepSetup, stop: Stop) -> float:
    """Return the approximate seconds of a trial of the unchanged config, from a few steps of each kind on this device.

    Raises:
        Interrupted: a stop was requested.
    """
    config = plan.proxy({})
    with ranks(config.compute, here=Placement()) as here:
        session = _open(config, load_dataset(config.data, config.compute.workers, here), here, stop)
        begun = time.perf_counter()
        synthesis = _Synthesis(session)
        total = time.perf_counter() - begun
        synthesis.advance_to(1)  # the first step is slower than the others
        steps, before = min(_TIMED_STEPS, config.synthesis.iterations), synthesis.seconds
        synthesis.advance_to(steps)
        total += (synthesis.seconds - before) / max(1, steps - 1) * config.synthesis.iterations
        found = synthesis.images()
        probed = plan.budget.rungs - 1 if plan.objective.students else 0
        wanted = [(config, 1), *([(plan.probe(config), probed)] if probed else [])]
        for task in tasks.student_tasks(config.replace({"student.seeds": 1}).student, config.labels.regimes):
            seconds = []
            for epochs in (1, 1, 2):  # the first student is slower than the others
                short = replace(session, config=config.replace({"student.epochs": epochs}))
                begun = time.perf_counter()
                with TemporaryDirectory() as labels:
                    train.train(short, task, found, SINGLE, Path(labels))
                seconds.append(time.perf_counter() - begun)
            epoch = max(0.0, seconds[2] - seconds[1])
            for own, times in wanted:
                students = times * own.student.seeds
                total += students * (max(0.0, seconds[1] - epoch) + epoch * own.student.epochs)
        return total


_TIMED_STEPS = 4
"""Steps of synthesis that the estimate of a trial takes."""


def _open(config: Config, dataset: Dataset, here: Ranks, stop: Stop) -> Session:
    if dataset.holdout is None:
        raise InputError("trials are judged on images held out of the training set: set budget.holdout_per_class")
    session = open_session(config, dataset, here, stop)
    # Without room in memory, the decoded hold-out is one file in the cache, which all trials map.
    mapped = config.replace({"data.memory_gb": 0.0}, "a trial")
    return replace(session, validation=Validation(mapped, dataset, here, stop))


class _Synthesis:
    """The groups of a distillation, advanced together, so that all classes are at the same iteration."""

    def __init__(self, session: Session) -> None:
        self._session = session
        method = blocks.check(session.config, session.dataset)
        self.seconds = 0.0
        """Seconds of synthesis, without students"""
        (block,) = class_partition.plan(session.config, len(session.dataset.classes))
        found = dict(statistics.measure(session, block.classes if method.uses_statistics else []))
        self._groups = [prepare_group(session, method, group, found) for group in block.groups]
        self._states = [State(group.images) for group in self._groups]

    def advance_to(self, iteration: int) -> None:
        """Resume every group until an iteration."""
        begun = time.perf_counter()
        check = StopCheck(SINGLE, self._session.stop, lambda: False)
        self._states = [
            optimize(group, state, self._session.ranks, check=check, until=iteration)
            for group, state in zip(self._groups, self._states, strict=True)
        ]
        self.seconds += time.perf_counter() - begun

    def _identity(self) -> dict[str, str]:
        """Return the marks of a checkpoint of this trial: a checkpoint with other marks is ignored."""
        session = self._session
        facts = [session.config.fingerprint("students"), session.dataset.fingerprint, session.teacher.sha256]
        return {"trial": digest(facts), "arithmetic": marked(session.ranks.arithmetic)}

    def save(self, path: Path, reports: list[Report]) -> None:
        """Write a checkpoint: the state of every group, and the reports so far."""
        tensors, curves = {}, []
        for index, state in enumerate(self._states):
            tensors[f"{index}.images"] = state.images
            if state.first is not None and state.second is not None:
                tensors |= {f"{index}.first": state.first, f"{index}.second": state.second}
            curves.append({"iteration": state.iteration, "curve": state.curve})
        meta = {"reports": json.dumps(reports), "states": json.dumps(curves), "seconds": str(self.seconds)}
        write_tensors(path, tensors, meta | self._identity())

    def restore(self, path: Path) -> list[Report]:
        """Resume from the checkpoint of this trial, if there is one; return the reports so far."""
        meta = read_metadata(path)
        if not meta or not self._identity().items() <= meta.items():
            return []
        tensors = read_tensors(path)
        self._states = [
            State(
                tensors[f"{index}.images"],
                known["iteration"],
                tensors.get(f"{index}.first"),
                tensors.get(f"{index}.second"),
                known["curve"],
            )
            for index, known in enumerate(json.loads(meta["states"]))
        ]
        self.seconds = float(meta["seconds"])
        reports: list[Report] = json.loads(meta["reports"])
        return reports

    def images(self) -> DistilledSet:
        """Return the current images, quantized like those of a block."""
        data, groups = self._session.config.data, self._groups
        images = quantize(torch.cat([state.images for state in self._states]), data)
        labels = torch.cat([group.labels for group in groups])
        weights = torch.cat([group.weights.flatten() for group in groups])
        parts = [part.numpy().tobytes() for part in (images, labels, weights)]
        sha = hashlib.sha256(b"".join(parts)).hexdigest()
        return DistilledSet(images, labels, weights, self._session.dataset.classes, data, sha)


def _students(session: Session, distilled: DistilledSet) -> Iterator[tuple[tasks.StudentTask, float]]:
    with TemporaryDirectory() as labels:  # for regimes with stored labels; needed only here
        config = session.config
        for task in tasks.student_tasks(config.student, config.labels.regimes):
            result = train.train(session, task, distilled, SINGLE, Path(labels))
            yield task, result.metrics["top1"]


def _judge(session: Session, distilled: DistilledSet) -> Report:
    """Return top-1: the mean over all students, the mean per label regime, and the mean per student seed."""
    config, found = session.config, list(_students(session, distilled))
    measured: Report = {
        regime: fmean(top1 for task, top1 in found if task.regime == regime) for regime in config.labels.regimes
    }
    own = range(config.student.first_seed, config.student.first_seed + config.student.seeds)
    seeds = [fmean(top1 for task, top1 in found if task.seed == seed) for seed in own]
    return {"top1": fmean(seeds), **measured, "seeds": seeds}


def _w2(session: Session, distilled: DistilledSet) -> float:
    """Return W2² in feature space between a class's weighted images and its held-out images, mean over classes."""
    from wmdd.distill.barycenter.solve import w2_squared

    holdout = session.dataset.validation
    real = _features(session, session.validation.reader()(0, len(holdout)))
    made = _features(session, distilled.images)
    found = []
    for index in range(len(session.dataset.classes)):
        own = distilled.labels == index
        weights = distilled.weights[own].double()
        found.append(w2_squared(real[holdout.labels == index], made[own], weights / weights.sum()))
    return fmean(found)


def _features(session: Session, images: Tensor) -> Tensor:
    batches = (normalize(batch, session.config.data) for batch in images.split(256))
    return torch.cat([session.teacher.observe(batch, session.ranks, len(batch)).features for batch in batches])


def _references(session: Session) -> dict[str, float]:
    """Return reference top-1 on the hold-out: of networks trained on all images, and of random real images."""
    config = session.config
    whole = []
    for network in config.student.networks:
        own = config.replace({"teacher.network": network, "teacher.weights": None}, "the reference")
        other = open_session(own, session.dataset, session.ranks, session.stop)
        whole.append(float(other.teacher.facts["top1"]))
    chosen = config.replace({"method": "random", "labels.regimes": ("soft",)}, "the reference")
    random = replace(session, config=chosen)
    return {"real_hard": fmean(whole), "random_soft": _judge(random, _Synthesis(random).images())["top1"]}
