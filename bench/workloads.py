"""The workload of a stage, and what all workloads share: images, a teacher, the first group of classes."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import Run
from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, load_dataset
from wmdd.data.synthetic import name_of
from wmdd.distill import blocks, statistics
from wmdd.errors import WmddError
from wmdd.networks import create
from wmdd.networks.accuracy import Validation
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runs import class_partition
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.ranks import Ranks, ranks
from wmdd.runtime.seeding import seed_of
from wmdd.session import Session, open_session
from wmdd.students import tasks
from wmdd.teacher.obtain import Teacher, is_stored

logger = logging.getLogger(f"wmdd.{__name__}")

OWN = "wmdd"
"""Name in records of the engine of this package."""

Checks = Mapping[str, Mapping[str, float]]
"""Engine -> metrics that compare its results with those of the others."""


@dataclass(frozen=True)
class Workload:
    """One stage: the contestants, their work, and a comparison of their results."""

    stage: str
    unit: str
    """Unit of the rate"""
    contestants: Mapping[str, Run]
    """Engine -> function to time; the first is this package's"""
    work: Callable[[int], float]
    """Returns the work in a number of steps, in the unit (for a rate per hour, 3600 times as much)"""
    most: int
    """Limit on the number of steps"""
    warm: int
    """Number of steps at the beginning of every repeat that do not count"""
    device: torch.device
    check: Callable[[], Checks]
    """Compares the contestants' results"""
    setup: Mapping[str, Any]
    """Keys that two speeds must share to be compared"""
    network: str | None = None
    """Name of the network"""
    step_flops: Callable[[], float] | None = None
    """Returns the floating-point operations of the networks in one step: those of the model, in any implementation"""
    step_work: float | None = None
    """Work of the step that ``step_flops`` counts, where other steps do less: a class's last batch is smaller"""


@dataclass(frozen=True)
class BenchSession(Session):
    """What all workloads share: a session, and values that are computed from it once."""

    trained: bool
    """Whether the teacher comes from the cache. Otherwise it is untrained, which changes no speed of a network"""

    @property
    def name(self) -> str:
        """Name of the dataset in records."""
        return name_of(self.config.data)

    @cached_property
    def groups(self) -> list[class_partition.Group]:
        """Return the groups of the run, in order."""
        return groups_of(self.config, len(self.dataset.classes))

    @cached_property
    def classifier(self) -> nn.Module:
        """Return the teacher as a plain network, in contiguous layout.

        Raises:
            WmddError: the outputs of the plain network differ from those of the frozen one.
        """
        return plain(self.teacher.network, self.config).to(self.ranks.device)

    @cached_property
    def measured(self) -> dict[int, statistics.ClassStatistics]:
        """Return the statistics of the first group's classes, from the cache or from one pass."""
        classes = self.groups[0].classes
        images = sum(len(self.dataset.train.of_class(index)) for index in classes)
        with progress("statistics of the first group", images, "images") as advance:
            return dict(statistics.measure(self, list(classes), advance))


def groups_of(config: Config, classes: int) -> list[class_partition.Group]:
    """Return the groups of a run, in order."""
    return [group for block in class_partition.plan(config, classes) for group in block.groups]


@contextmanager
def open_bench(config: Config) -> Iterator[BenchSession]:
    """Join the ranks, list the images, and load the cached teacher or make an untrained one.

    Raises:
        InputError: the config or the dataset is wrong.
    """
    with ranks(config.compute) as job:
        dataset = load_dataset(config.data, config.compute.workers, job)
        blocks.check(config, dataset)
        tasks.check(config, len(dataset.classes))
        yield bench_session(config, dataset, job)


def bench_session(config: Config, dataset: Dataset, job: Ranks) -> BenchSession:
    """Return a session with the cached teacher, or with an untrained one from a fixed seed."""
    if is_stored(config, dataset, [job.arithmetic]):
        return BenchSession(**vars(open_session(config, dataset, job, _never)), trained=True)
    data, settings = config.data, config.teacher
    logger.warning("the cache has no teacher for this config: an untrained one is used, which changes no speed")
    torch.manual_seed(seed_of("bench", "teacher"))
    network = create.create(settings.network, len(dataset.classes), data.channels, data.resolution, settings.stem)
    name = f"untrained-{settings.network}-{settings.stem}-{data.resolution}"
    frozen = FrozenNetwork(network)
    if job.precision == "bf16":
        frozen.round_once()
    teacher = Teacher(frozen.to(job.device), name, {"network": settings.network})
    return BenchSession(config, dataset, Validation(config, dataset, job), teacher, job, _never, trained=False)


def _never() -> bool:
    return False


def plain(frozen: FrozenNetwork, config: Config) -> nn.Module:
    """Return the classifier of a frozen network: contiguous, in evaluation mode, without gradients.

    Raises:
        WmddError: its outputs differ from those of the frozen network.
    """
    data, settings = config.data, config.teacher
    network = create.create(settings.network, frozen.classes, data.channels, data.resolution, settings.stem)
    network.to(memory_format=torch.contiguous_format)
    inner = [module for module in frozen.body.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    outer = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    for mine, its in zip(outer, [*inner, frozen.head], strict=True):
        mine.load_state_dict(its.state_dict())
    network.eval().requires_grad_(False)
    images = torch.randn(2, data.channels, data.resolution, data.resolution)
    with torch.no_grad():
        found, expected = network(images), frozen.predict(images.to(next(frozen.parameters()).device)).cpu()
    if difference(found, expected) > 1e-3:
        raise WmddError(f"the plain {settings.network} gives other outputs than the frozen one; use --no-reference")
    return network


def difference(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())
