"""Students: networks trained on a distilled set from scratch, judged at their last epoch."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from wmdd import labels, networks
from wmdd.config import Config, Student
from wmdd.distilled import DistilledSet
from wmdd.distributed import Ranks, Team, seed_of
from wmdd.errors import Interrupted
from wmdd.teacher import Teacher
from wmdd.validation import Validation


@dataclass(frozen=True)
class Task:
    """One student: architecture, label regime, seed, and how long and on what it trains (``student.views``)."""

    network: str
    regime: str
    seed: int
    view: str = "epochs"


@dataclass(frozen=True)
class Result:
    """What a student reached at its last epoch."""

    metrics: dict[str, float]
    """top1, top5 (fractions), loss"""
    updates: int
    """Optimiser steps"""
    seconds: float
    """Training and validation"""


def tasks(settings: Student, regimes: tuple[str, ...]) -> list[Task]:
    """Return the students of a run: architectures × label regimes × views × seeds."""
    return [
        Task(network, regime, seed, view)
        for network in settings.networks
        for regime in regimes
        for view in settings.views
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
    ]


def train(
    config: Config,
    task: Task,
    distilled: DistilledSet,
    teacher: Teacher,
    validation: Validation,
    ranks: Ranks,
    team: Team,
    folder: Path,
    advance: Callable[[int], None] = lambda updates: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train one student and measure it.

    AdamW with a (smoothed) cosine schedule per epoch.  ``hard``: cross-entropy with the mixed classes.  ``soft``: KL
    divergence to the teacher's logits for the same mixed batch at temperature T, times T².  Initialisation and batches
    follow from the student's seed alone, so students of one seed on different sets are pairs.

    Args:
        config: recipe.
        task: which student.
        distilled: the set.
        teacher: labels the batches of the soft regime.
        validation: judges the student.
        ranks: device and precision.
        team: the ranks that train it together; each takes its share of every batch.
        folder: where soft labels are stored if the config says so.
        advance: called with the number of updates done.
        stop: whether to leave between two epochs.

    Raises:
        Interrupted: a stop was requested; a student starts again next time.
    """
    begun = time.perf_counter()
    settings, data = config.student, config.data
    torch.manual_seed(seed_of("student", task.seed))
    network = networks.create(task.network, len(distilled.classes), data.channels, data.resolution).to(ranks.device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    soft = labels.SoftLabels(config, distilled, teacher, task.seed, ranks, folder) if task.regime != "hard" else None
    images, classes = distilled.images.to(ranks.device), distilled.labels.to(ranks.device)
    importance = _importance(distilled).to(ranks.device) if config.labels.weighted else None
    parallel = team.wrap(network.train())
    updates = 0
    for epoch in range(settings.epochs):
        if team.sum(torch.tensor(float(stop()))):
            raise Interrupted("stopped between two epochs of a student")
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _smoothed_cosine(epoch, settings)
        plan = labels.batches(task.seed, epoch, len(images), data.resolution, settings.batch_size, config.labels)
        stored = _stored(soft, images, epoch) if soft and task.regime != "soft" else None
        for position, batch in enumerate(plan):
            seen = team.shard(labels.view(images, batch, config))
            with ranks.autocast():
                logits = parallel(seen)
            if soft is None:
                loss = _hard_loss(logits.float(), classes, batch, team, importance)
            else:
                wanted = team.shard(stored[position]) if stored else soft.online(seen)
                shares = None if importance is None else team.shard(_mixed(importance, batch))
                loss = _soft_loss(logits.float(), wanted, config.labels.temperature, shares)
            optimizer.zero_grad(set_to_none=True)
            (loss * (team.size / len(batch.images))).backward()
            optimizer.step()
            updates += 1
            advance(1)
    network.eval()
    return Result(validation(network, team), updates, time.perf_counter() - begun)


def update_count(config: Config, images: int) -> int:
    """Return the optimiser steps of one student on a set of so many images."""
    size = config.student.batch_size
    return config.student.epochs * (len(range(size, images - 1, size)) + 1)


def _stored(soft: labels.SoftLabels, images: Tensor, epoch: int) -> list[Tensor]:
    # In a team each rank may write the file: they write the same bytes, each under a name of its own first.
    if not soft.file(epoch).exists():
        soft.store(images, epoch)
    return soft.read(epoch)


def _importance(distilled: DistilledSet) -> Tensor:
    """Return how much each image counts, [N]: its barycenter weight, on average 1."""
    weights = distilled.weights.float()
    return weights * (len(weights) / weights.sum())


def _mixed(importance: Tensor, batch: labels.Batch) -> Tensor:
    """Return how much each mixed image of a batch counts, [b]."""
    own = importance[batch.images.to(importance.device)]
    return batch.share * own + (1 - batch.share) * own[batch.partners.to(own.device)]


def _hard_loss(
    logits: Tensor, classes: Tensor, batch: labels.Batch, team: Team, importance: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the classes of both images of a mix, summed over this rank's images."""

    def part(images: Tensor) -> Tensor:
        wanted = team.shard(classes[images])
        if importance is None:
            return functional.cross_entropy(logits, wanted, reduction="sum")
        return functional.cross_entropy(logits, wanted, reduction="none") @ team.shard(importance[images])

    own = batch.images.to(classes.device)
    loss = batch.share * part(own)
    if batch.share < 1:
        loss = loss + (1 - batch.share) * part(own[batch.partners.to(classes.device)])
    return loss


def _soft_loss(logits: Tensor, wanted: Tensor, temperature: float, importance: Tensor | None = None) -> Tensor:
    """KL divergence at a temperature, summed over images, times T² so that gradients keep their size (Hinton 2015)."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.softmax(wanted / temperature, dim=1)
    if importance is None:
        return functional.kl_div(student, teacher, reduction="sum") * temperature**2
    return functional.kl_div(student, teacher, reduction="none").sum(1) @ importance * temperature**2


def _smoothed_cosine(epoch: int, settings: Student) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / (settings.epochs * settings.cosine_stretch)))


def check(config: Config, classes: int) -> None:
    """Build every student architecture once.

    Raises:
        InputError: no such network, or it cannot take images that small.
    """
    for name in config.student.networks:
        with torch.device("meta"):
            networks.create(name, classes, config.data.channels, config.data.resolution)
