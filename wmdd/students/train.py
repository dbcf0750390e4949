"""The training of a student."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wmdd.config.schema import StudentConfig
from wmdd.data.image_parts import near
from wmdd.errors import Interrupted
from wmdd.networks import create
from wmdd.networks.accuracy import Judgement
from wmdd.networks.checkpoint import Checkpoint, StopCheck
from wmdd.networks.epoch_log import EpochLog
from wmdd.runs.distilled_set import DistilledSet, MappedSet
from wmdd.runtime.meter import Meter
from wmdd.runtime.seeding import seed_of
from wmdd.runtime.team import Team
from wmdd.session import Session
from wmdd.students import batches, soft_labels
from wmdd.students.losses import gift_loss, hard_loss, importance_of, mixed, soft_loss, squared_error
from wmdd.students.tasks import (
    StudentTask,
    config_for_view,
    reads_stored_labels,
    update_count,
    updates_per_epoch,
)


@dataclass(frozen=True)
class Result:
    """Accuracy and cost of a trained student."""

    judged: Judgement
    """Accuracy after the last epoch"""
    updates: int
    """Number of optimizer steps"""
    cost: dict[str, float]
    """Cost of training, labeling and validation (``Meter.read``, ``SoftLabels.cost``), and size of the images"""
    best: dict[str, float] = field(default_factory=dict)
    """``epoch`` and ``top1`` of the best validated epoch; empty without ``student.validate_every``"""

    @property
    def metrics(self) -> dict[str, float]:
        """``top1``, ``top5`` (fractions) and ``loss``"""
        return self.judged.metrics


def train(
    session: Session,
    task: StudentTask,
    distilled: DistilledSet | MappedSet,
    team: Team,
    folder: Path,
    advance: Callable[[int], None] = lambda updates: None,
    checkpoint: Checkpoint | None = None,
    log_file: Path | None = None,
) -> Result:
    """Train one student and measure it.

    The optimizer is AdamW, with a (smoothed) cosine schedule per epoch. The loss of the regime ``hard`` is the
    cross-entropy with the mixed classes. Other regimes use the teacher's logits for the same mixed batch
    (``labels.loss``): KL divergence at temperature T, times T², squared error, or cosine. Initialization and batches
    depend on the student's seed alone, so students of one seed on different sets are pairs.

    Args:
        session: session of the run. Its config is the recipe; its teacher labels the batches of soft regimes. A stop
            request is noticed before every update, by a team about once per second.
        task: student to train.
        distilled: distilled set to train on.
        team: ranks that train the student together; each takes its share of every batch.
        folder: parent folder of stored soft labels.
        advance: called with the number of updates done.
        checkpoint: checkpoint of the student, written when due and at a stop; training resumes from it.
        log_file: file that gets one line per epoch (``EpochLog``).

    Raises:
        Interrupted: a stop was requested.
    """
    ranks, meter = session.ranks, Meter(session.ranks.device, team.size)
    wanted_updates = update_count(session.config, task.view, len(distilled))
    config = config_for_view(session.config, task.view, len(distilled))
    settings, data = config.student, config.data
    torch.manual_seed(seed_of("student", task.seed))
    network = create.create(task.network, len(distilled.classes), data.channels, data.resolution).to(ranks.device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    soft = None
    if task.regime != "hard":
        soft = soft_labels.SoftLabels(config, distilled, session.teacher, task.regime, task.seed, ranks, folder)
    images, classes = near(distilled.images, ranks.device), distilled.labels.to(ranks.device)
    power = config.barycenter.weight_power if config.labels.weighted else 0
    importance = importance_of(distilled, power).to(ranks.device) if power else None
    # Not torch's AveragedModel: its counter makes the host wait for the device in every update.
    weights, follow = list(network.parameters()), get_ema_multi_avg_fn(settings.ema)
    average = [weight.detach().clone() for weight in weights] if settings.ema else []
    parts = {"network": network, "optimizer": optimizer}
    found = checkpoint.load(parts, ranks.device, team) if checkpoint else {}
    steps = updates_per_epoch(config, len(distilled))
    done = int(found.get("epoch", 0)) * steps + int(found.get("position", 0))
    for mean, kept in zip(average, found.get("average", average), strict=True):
        mean.copy_(kept)
    meter.add_previous(found.get("spent", {}))
    if done:
        advance(done)
    # The last epoch that was validated, seconds of all validations, and the best epoch.
    validated, judging = int(found.get("validated", 0)), float(found.get("judging", 0.0))
    best = dict(found.get("best", {}))
    log = EpochLog(log_file, team, ranks.device)
    log.restore(found.get("log", {}))
    example = torch.zeros(2, data.channels, data.resolution, data.resolution, device=ranks.device)
    parallel = ranks.compiled(team.wrap(network.train(), example))
    check = StopCheck(team, session.stop, checkpoint.due if checkpoint else lambda: False)

    def save() -> None:
        if checkpoint:
            epoch, position = divmod(done, steps)
            checkpoint.save(
                parts,
                ranks.device,
                team,
                epoch=epoch,
                position=position,
                average=average,
                spent=meter.read(),
                log=log.state(),
                validated=validated,
                judging=judging,
                best=best,
            )

    def validate(epoch: int) -> Judgement:
        nonlocal validated, judging, best
        begun = meter.read()["seconds"]
        shown = averaged_copy(network, average, team)
        # Decoding may draw random numbers; the random state of the training must not change.
        with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
            judged = session.validation(shown, team)
        log.add_validation(epoch, judged.metrics)
        validated, judging = epoch, judging + meter.read()["seconds"] - begun
        if settings.validate_every and judged.metrics["top1"] > best.get("top1", -1.0):
            best = {"epoch": epoch, "top1": judged.metrics["top1"]}
        return judged

    def validate_on_the_way() -> None:
        epoch, position = divmod(done, steps)
        due = settings.validate_every and not position and epoch % settings.validate_every == 0
        if due and validated < epoch < settings.epochs:
            validate(epoch)

    try:
        validate_on_the_way()  # the last stop may have interrupted a validation
        for epoch in range(done // steps, settings.epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _smoothed_cosine(epoch, settings)
            visit = soft.source_epoch(epoch) if soft else epoch
            plan = batches.batches(
                task.seed, visit, len(images), data.resolution, settings.batch_size, config.labels, ranks.device
            )
            stored = reads_stored_labels(soft, images, visit, team, session.stop) if soft and soft.stored else None
            for position in range(done % steps, min(steps, wanted_updates - epoch * steps)):
                stopping, saving = check()
                if stopping:
                    raise Interrupted
                if saving:
                    save()
                batch = plan[position]
                views = batches.augmented_batch(images, batch, config)
                with ranks.autocast():
                    logits = parallel(team.shard(views))
                if soft is None:
                    loss = hard_loss(logits.float(), classes, batch, team, importance)
                else:
                    wanted = team.shard(stored[position]) if stored else soft.online(views, team)
                    shares = None if importance is None else team.shard(mixed(importance, batch))
                    if config.labels.loss == "kl":
                        loss = soft_loss(logits.float(), wanted, config.labels.temperature, shares)
                    elif config.labels.loss == "gift":
                        loss = gift_loss(logits.float(), wanted, classes, batch, team, shares)
                    else:
                        entropy = hard_loss(logits.float(), classes, batch, team, importance)
                        loss = squared_error(logits.float(), wanted, shares) + config.labels.ce_weight * entropy
                optimizer.zero_grad(set_to_none=True)
                log.count(loss, len(batch.images))
                (loss * (team.size / len(batch.images))).backward()
                optimizer.step()
                if average:
                    follow(average, weights, None)
                done += 1
                advance(1)
            log.end_epoch(epoch + 1, done, optimizer.param_groups[0]["lr"])
            validate_on_the_way()
            log.write_if_due()
        judged = validate(settings.epochs)
        log.write()
    except Interrupted:
        save()
        how = "checkpointed" if checkpoint else "stopped"
        raise Interrupted(f"student {how} after {done} of {wanted_updates} updates") from None
    labelled = done // steps * len(distilled) + done % steps * settings.batch_size
    cost = {"image_bytes": float(distilled.bytes), "label_bytes": 0.0, **(soft.cost(labelled, team) if soft else {})}
    spent = meter.read() | {"validation_seconds": round(judging, 3)}
    return Result(judged, done, spent | {"updates": float(done)} | cost, best)


def averaged_copy(network: nn.Module, average: list[Tensor], team: Team) -> nn.Module:
    """Return a copy of the network for validation: in evaluation mode, with the averaged weights if there are any.

    All ranks of the team get the buffers of the first rank.
    """
    shown = copy.deepcopy(network).eval()
    for weight, mean in zip(shown.parameters(), average or network.parameters(), strict=True):
        weight.data.copy_(mean)
    team.share_buffers(shown)
    return shown


def _smoothed_cosine(epoch: int, settings: StudentConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / (settings.epochs * settings.cosine_stretch)))
