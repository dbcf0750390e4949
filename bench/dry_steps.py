"""One step of each stage on tensors without values: no data set, no GPU, no memory for images.

The images of a step are fake tensors. Everything that is computed from them is fake too, so the engine's own functions
run, and only shapes and types are computed. The result is the same on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.op_counter import OpCounts, steps_of
from bench.workloads import groups_of
from wmdd.config.schema import Config
from wmdd.data import augment
from wmdd.data.pixels import normalize, pixel_range
from wmdd.distill.methods import registry
from wmdd.distill.synthesis.engine import Problem, State, synthesize
from wmdd.distill.synthesis.objective import Target
from wmdd.networks.accuracy import Judgement
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runs.distilled_set import DistilledSet
from wmdd.runtime.arithmetic import Arithmetic
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.seeding import generator
from wmdd.runtime.team import SINGLE
from wmdd.session import Session
from wmdd.students import tasks, train
from wmdd.teacher.obtain import Teacher
from wmdd.teacher.train import create_network, optimizer_of, update

_STEPS = 2
"""Steps of a dry run. The second counts: the first one creates the optimizer's state"""


@dataclass(frozen=True)
class DryStep:
    """What one step of a stage does."""

    stage: str
    network: str
    images: int
    """Number of images of the step"""
    counts: OpCounts
    """Kernels, bytes and FLOPs of the step"""
    peak: int
    """Peak memory of the steps in bytes: weights, gradients, optimizer, images and activations"""


def precision_of(config: Config) -> str:
    """Return the precision on a GPU, where ``auto`` is bf16."""
    return "bf16" if config.compute.precision == "auto" else config.compute.precision


def dry_steps(config: Config, classes: int) -> list[DryStep]:
    """Return a step of every stage of a run: statistics, synthesis, students and the training of the teacher.

    A stage that the method does not have is left out. There is a step for each architecture of the students.

    Args:
        config: config of the run.
        classes: number of classes in the dataset.

    Raises:
        InputError: a network does not exist.
    """
    method = registry.create(config)
    found = []
    if method.uses_statistics:
        found.append(statistics_step(config, classes))
    if method.objective() is not None:
        group = groups_of(config, classes)[0]
        low, high = group.images or (0, config.ipc)
        found.append(synthesis_step(config, classes, len(group.classes), high - low))
    found += [student_step(config, classes, name) for name in config.student.networks]
    if config.teacher.weights is None:
        found.append(teacher_step(config, classes))
    return found


def statistics_step(config: Config, classes: int) -> DryStep:
    """Return the step that observes one batch of real images."""
    dry = _DryRun(config, classes)
    size = config.statistics.batch_size
    teacher, images = dry.teacher, dry.pixels(size)

    def run(advance: Callable[[int], None]) -> None:
        source = generator("dry")
        for _ in range(_STEPS):
            shown = normalize(images, config.data)
            if config.statistics.augment:
                settings, side = config.synthesis, config.data.resolution
                draws = augment.draw((size,), side, settings.crop_scale, settings.flip, 0, source)
                shown = augment.warp(shown, draws)
            teacher.observe(shown, dry.ranks, size)
            advance(1)

    return dry.step("statistics", config.teacher.network, size, run)


def synthesis_step(config: Config, classes: int, group: int, count: int) -> DryStep:
    """Return one iteration of a group of ``group`` classes with ``count`` images of each.

    With ``synthesis.split_class`` it is the iteration of one rank; the exchange between ranks is not counted.
    """
    dry = _DryRun(config, classes)
    method = registry.create(config)
    objective, settings = method.objective(), method.synthesis()
    assert objective is not None  # noqa: S101 - the caller has asked the method
    count = max(1, count // settings.split_class)
    frozen = dry.teacher.network
    rows, channels = group if objective.per_class else 1, sum(frozen.layer_sizes)
    target = Target(
        torch.zeros(group * count, dtype=torch.int64),
        torch.full((group, count), 1 / count),
        dry.fake((rows, channels)),
        dry.fake((rows, channels)),
        dry.fake((group, count, frozen.feature_size)) if objective.feature else None,
    )
    # Iterations 1 and 2 of many: no loss is logged there, which would need a value.
    settings = settings.replace({"iterations": 1000})
    problem = Problem(frozen, objective, target, settings, pixel_range(config.data), ("dry",))
    state = State(dry.fake((group * count, *dry.shape)), iteration=1)

    def run(advance: Callable[[int], None]) -> None:
        synthesize(problem, state, dry.ranks, advance=advance, until=1 + _STEPS)

    return dry.step("synthesis", config.teacher.network, group * count, run)


def student_step(config: Config, classes: int, network: str, batch_size: int | None = None) -> DryStep:
    """Return one update of a student on soft labels, or on hard ones where the config has no others.

    Args:
        config: config of the run.
        classes: number of classes in the dataset.
        network: architecture of the student.
        batch_size: number of images of an update; None: that of the config, or the whole set if it is smaller.
    """
    size = batch_size or min(config.student.batch_size, classes * config.ipc)
    dry = _DryRun(config, classes)
    count = max(classes * config.ipc, (_STEPS + 1) * size)  # all steps in one epoch
    names = tuple(map(str, range(classes)))
    labels = torch.arange(count) % classes
    distilled = DistilledSet(dry.pixels(count), labels, torch.full((count,), 1.0), names, config.data, "dry")
    recipe = config.replace({"student.updates": _STEPS, "student.batch_size": size})
    regime = "hard" if set(config.labels.regimes) == {"hard"} else "soft"
    task = tasks.StudentTask(network, regime, 0, "updates")
    unused: Any = None  # training asks for the dataset only where it validates
    session = Session(recipe, unused, lambda shown, team: Judgement({}), dry.teacher, dry.ranks, lambda: False)  # type: ignore[arg-type]  # any judge will do

    def run(advance: Callable[[int], None]) -> None:
        with TemporaryDirectory() as folder:
            train.train(session, task, distilled, SINGLE, Path(folder), advance)

    return dry.step("students", network, size, run)


def teacher_step(config: Config, classes: int) -> DryStep:
    """Return one update of the teacher's training on one rank."""
    dry = _DryRun(config, classes)
    settings, side = config.teacher, config.data.resolution
    size = settings.batch_size // settings.ranks or 1
    images, wanted = dry.pixels(size), torch.zeros(size, dtype=torch.int64)
    network = create_network(config, classes).train()
    optimizer = optimizer_of(network, config)
    draws = augment.draw((size,), side, (settings.crop_scale, 1.0), settings.flip, 0, generator("dry"))

    def run(advance: Callable[[int], None]) -> None:
        for _ in range(_STEPS):
            shown = augment.warp(normalize(images, config.data), draws)
            update(network, optimizer, dry.ranks, (shown, wanted), 1 / size, settings.label_smoothing)
            advance(1)

    return dry.step("teacher", settings.network, size, run)


class _DryRun:
    """What all dry steps share: fake images, a teacher with arbitrary weights, one rank without a GPU."""

    def __init__(self, config: Config, classes: int) -> None:
        data = config.data
        # The precision of a GPU, on the CPU: autocast has the same rules for convolutions, products and BatchNorm.
        precision = precision_of(config)
        self.ranks = Ranks(0, 1, torch.device("cpu"), Arithmetic("cpu", precision, False, True, 1))  # type: ignore[arg-type]  # one of its values
        self.shape = (data.channels, data.resolution, data.resolution)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._config, self._classes = config, classes

    @cached_property
    def teacher(self) -> Teacher:
        """Return a teacher with arbitrary weights."""
        frozen = FrozenNetwork(create_network(self._config, self._classes))
        if self.ranks.precision == "bf16":
            frozen.round_once()
        return Teacher(frozen, "dry", {"network": self._config.teacher.network})

    def fake(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor without values and without memory."""
        with self._mode:
            return torch.empty(shape, dtype=dtype)

    def pixels(self, count: int) -> Tensor:
        """Return ``count`` fake images, uint8."""
        return self.fake((count, *self.shape), torch.uint8)

    def step(self, stage: str, network: str, images: int, run: Callable[[Callable[[int], None]], object]) -> DryStep:
        """Run the steps and return the counts of the second one."""
        # Random numbers are drawn for arbitrary weights; those of the caller do not change.
        with torch.random.fork_rng([]):
            steps, peak = steps_of(run, _STEPS)
        return DryStep(stage, network, images, steps[1], peak)
