"""Students: networks trained on a distilled set from scratch, judged at their last epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wmdd import labels, networks
from wmdd.checkpoint import Checkpoint, StopCheck
from wmdd.config import Config, Student
from wmdd.cost import Meter
from wmdd.distilled import DistilledSet
from wmdd.distributed import Ranks, Team, seed_of
from wmdd.errors import InputError, Interrupted
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
    cost: dict[str, float]
    """What training, labelling and validation took (``Meter.read``, ``SoftLabels.cost``), and bytes of the images"""


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
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Train one student and measure it.

    AdamW with a (smoothed) cosine schedule per epoch.  ``hard``: cross-entropy with the mixed classes.  Else: KL
    divergence to the teacher's logits for the same mixed batch at temperature T, times T², or their squared error
    (``labels.loss``).  Initialisation and batches follow from the student's seed alone, so students of one seed on
    different sets are pairs.

    Args:
        config: recipe.
        task: which student.
        distilled: the set.
        teacher: labels the batches of the soft regimes.
        validation: judges the student.
        ranks: device and precision.
        team: the ranks that train it together; each takes its share of every batch.
        folder: where soft labels are stored if the config says so.
        advance: called with the number of updates done.
        stop: whether to leave; looked at before every update, by a team about once a second.
        checkpoint: where it is kept when that is due and at a stop, and where it resumes.

    Raises:
        Interrupted: a stop was requested.
    """
    meter = Meter(ranks.device, team.size)
    wanted_updates = update_count(config, task.view, len(distilled))
    config = seen(config, task.view, len(distilled))
    settings, data = config.student, config.data
    torch.manual_seed(seed_of("student", task.seed))
    network = networks.create(task.network, len(distilled.classes), data.channels, data.resolution).to(ranks.device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    soft = None
    if task.regime != "hard":
        soft = labels.SoftLabels(config, distilled, teacher, task.regime, task.seed, ranks, folder)
    images, classes = distilled.images.to(ranks.device), distilled.labels.to(ranks.device)
    importance = _importance(distilled).to(ranks.device) if config.labels.weighted else None
    # Not torch's AveragedModel, whose counter makes the host wait for the device in every update.
    weights, follow = list(network.parameters()), get_ema_multi_avg_fn(settings.ema)
    average = [weight.detach().clone() for weight in weights] if settings.ema else []
    parts = {"network": network, "optimizer": optimizer}
    found = checkpoint.load(parts, ranks.device, team) if checkpoint else {}
    steps = _steps(config, len(distilled))
    done = int(found.get("epoch", 0)) * steps + int(found.get("position", 0))
    for mean, kept in zip(average, found.get("average", average), strict=True):
        mean.copy_(kept)
    meter.include(found.get("spent", {}))
    if done:
        advance(done)
    example = torch.zeros(2, data.channels, data.resolution, data.resolution, device=ranks.device)
    parallel = ranks.compiled(team.wrap(network.train(), example))
    check = StopCheck(team, stop, checkpoint.due if checkpoint else lambda: False)

    def save() -> None:
        if checkpoint:
            epoch, position = divmod(done, steps)
            checkpoint.save(
                parts, ranks.device, team, epoch=epoch, position=position, average=average, spent=meter.read()
            )

    try:
        for epoch in range(done // steps, settings.epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _smoothed_cosine(epoch, settings)
            visit = soft.visited(epoch) if soft else epoch
            plan = labels.batches(
                task.seed, visit, len(images), data.resolution, settings.batch_size, config.labels, ranks.device
            )
            stored = _stored(soft, images, visit, team, stop) if soft and soft.stored else None
            for position in range(done % steps, min(steps, wanted_updates - epoch * steps)):
                stopping, saving = check()
                if stopping:
                    raise Interrupted
                if saving:
                    save()
                batch = plan[position]
                views = labels.view(images, batch, config)
                with ranks.autocast():
                    logits = parallel(team.shard(views))
                if soft is None:
                    loss = _hard_loss(logits.float(), classes, batch, team, importance)
                else:
                    wanted = team.shard(stored[position]) if stored else soft.online(views, team)
                    shares = None if importance is None else team.shard(_mixed(importance, batch))
                    if config.labels.loss == "kl":
                        loss = _soft_loss(logits.float(), wanted, config.labels.temperature, shares)
                    else:
                        entropy = _hard_loss(logits.float(), classes, batch, team, importance)
                        loss = _squared_error(logits.float(), wanted, shares) + config.labels.ce_weight * entropy
                optimizer.zero_grad(set_to_none=True)
                (loss * (team.size / len(batch.images))).backward()
                optimizer.step()
                if average:
                    follow(average, weights, None)
                done += 1
                advance(1)
        if average:
            for weight, mean in zip(weights, average, strict=True):
                weight.data.copy_(mean)
        team.share_buffers(network)
        network.eval()
        metrics = validation(network, team)
    except Interrupted:
        save()
        how = "checkpointed" if checkpoint else "stopped"
        raise Interrupted(f"student {how} after {done} of {wanted_updates} updates") from None
    labelled = done // steps * len(distilled) + done % steps * settings.batch_size
    cost = {"image_bytes": float(distilled.bytes), "label_bytes": 0.0, **(soft.cost(labelled, team) if soft else {})}
    return Result(metrics, done, meter.read() | {"updates": float(done)} | cost)


def seen(config: Config, view: str, images: int) -> Config:
    """Return the config under which a student of a view trains: its number of epochs and its augmentation."""
    student, settings = config.student, config.labels
    if view == "updates":
        student = student.model_copy(update={"epochs": -(-student.updates // _steps(config, images))})
    if view == "plain":
        settings = settings.model_copy(update={"crop_scale": 1.0, "flip": False, "mix": "none"})
    return config.model_copy(update={"student": student, "labels": settings})


def update_count(config: Config, view: str, images: int) -> int:
    """Return the optimiser steps of one student on a set of so many images."""
    return config.student.updates if view == "updates" else config.student.epochs * _steps(config, images)


def checkpoint_bytes(config: Config, classes: int) -> int:
    """Return the bytes of the largest student's checkpoint: its weights, their average, and AdamW's two moments."""
    copies = 4 if config.student.ema else 3
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in _outlines(config, classes)]
    return 4 * copies * max(sizes)


def _outlines(config: Config, classes: int) -> list[nn.Module]:
    """Build every student architecture once, without weights."""
    data = config.data
    with torch.device("meta"):
        return [networks.create(name, classes, data.channels, data.resolution) for name in config.student.networks]


def _steps(config: Config, images: int) -> int:
    """Return the optimiser steps of one epoch (``labels.batches``)."""
    size = config.student.batch_size
    return len(range(size, images - 1, size)) + 1


def _stored(soft: labels.SoftLabels, images: Tensor, epoch: int, team: Team, stop: Callable[[], bool]) -> list[Tensor]:
    # In a team each rank may write the file: they write the same bytes, each under a name of its own first.
    def write() -> None:
        if not soft.file(epoch).exists():
            soft.store(images, epoch, stop)

    team.together(write)
    return soft.read(epoch)


def _importance(distilled: DistilledSet) -> Tensor:
    """Return how much each image counts, [N]: its barycenter weight, on average 1."""
    weights = distilled.weights.float()
    return weights * (len(weights) / weights.sum())


def _mixed(importance: Tensor, batch: labels.Batch) -> Tensor:
    """Return how much each mixed image of a batch counts, [b]."""
    own = importance[batch.images]
    return batch.share * own + (1 - batch.share) * own[batch.partners]


def _hard_loss(
    logits: Tensor, classes: Tensor, batch: labels.Batch, team: Team, importance: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the classes of both images of a mix, summed over this rank's images."""

    def part(images: Tensor) -> Tensor:
        wanted = team.shard(classes[images])
        if importance is None:
            return functional.cross_entropy(logits, wanted, reduction="sum")
        return functional.cross_entropy(logits, wanted, reduction="none") @ team.shard(importance[images])

    loss = batch.share * part(batch.images)
    if batch.share < 1:
        loss = loss + (1 - batch.share) * part(batch.images[batch.partners])
    return loss


def _soft_loss(logits: Tensor, wanted: Tensor, temperature: float, importance: Tensor | None = None) -> Tensor:
    """KL divergence at a temperature, summed over images, times T² so that gradients keep their size (Hinton 2015)."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.softmax(wanted / temperature, dim=1)
    if importance is None:
        return functional.kl_div(student, teacher, reduction="sum") * temperature**2
    return functional.kl_div(student, teacher, reduction="none").sum(1) @ importance * temperature**2


def _squared_error(logits: Tensor, wanted: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error between logits, mean over classes, summed over images (Shao et al. 2024, EDC)."""
    errors = functional.mse_loss(logits, wanted, reduction="none").mean(1)
    return errors.sum() if importance is None else errors @ importance


def _smoothed_cosine(epoch: int, settings: Student) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / (settings.epochs * settings.cosine_stretch)))


def check(config: Config, classes: int) -> None:
    """Build every student architecture once, and see whether a budget pays for labels.

    Raises:
        InputError: no such network, or it cannot take images that small, or ``labels.budget`` is too small, or a
            teacher that goes by the statistics of its batch would get one image.
    """
    images = classes * config.ipc
    for regime in config.labels.regimes:
        labels.stored_epochs(config, regime, images, classes)
    if config.labels.teacher_mode == "batch" and min(config.student.batch_size, images) == 1:
        raise InputError(
            "labels.teacher_mode = batch: a batch of one image has no statistics; use larger ones, or teacher_mode=eval"
        )
    _outlines(config, classes)
