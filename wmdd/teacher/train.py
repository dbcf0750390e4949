"""The training of a teacher: crops and flips, a cosine to zero, checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from wmdd.config.schema import Config
from wmdd.data import augment
from wmdd.data.batch_sources import batch_source, copies_on_node, is_held
from wmdd.data.dataset import Dataset, decode_all
from wmdd.data.pixels import normalize
from wmdd.errors import Interrupted
from wmdd.networks import create
from wmdd.networks.checkpoint import Checkpoint, StopCheck
from wmdd.networks.epoch_log import EpochLog
from wmdd.networks.frozen import FrozenNetwork
from wmdd.runtime.meter import Meter
from wmdd.runtime.progress_bars import progress
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.seeding import generator, seed_of
from wmdd.runtime.team import Team


def create_network(config: Config, classes: int) -> nn.Module:
    """Return an untrained teacher with ``classes`` outputs."""
    data, settings = config.data, config.teacher
    return create.create(settings.network, classes, data.channels, data.resolution, settings.stem)


def train(
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    team: Team,
    checkpoint: Checkpoint,
    meter: Meter,
    stop: Callable[[], bool],
    log_file: Path | None = None,
) -> nn.Module:
    """Train on the decoded images with crops and flips; the learning rate follows a cosine to zero.

    Checkpoints are written when due, at a stop, and after the last update. A stop during the teacher's validation thus
    loses no training. ``log_file`` gets one line per epoch (``EpochLog``).
    """
    settings, data = config.teacher, config.data
    torch.manual_seed(seed_of(settings.seed, "teacher"))
    network = create_network(config, len(dataset.classes)).to(ranks.device)
    FrozenNetwork(network)  # refuses a network without BatchNorm before it is trained
    optimizer = optimizer_of(network, config)
    count, size = len(dataset.train), settings.batch_size
    bounds = [(start, min(start + size, count)) for start in range(0, count, size)]
    batches = len(bounds)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    found = checkpoint.load(parts, ranks.device, team)
    done = int(found.get("epoch", 0)) * batches + int(found.get("position", 0))
    meter.add_previous(found.get("spent", {}))
    if done == settings.epochs * batches:
        return network.cpu()

    def save() -> None:
        epoch, position = divmod(done, batches)
        checkpoint.save(parts, ranks.device, team, epoch=epoch, position=position, spent=meter.read(), log=log.state())

    held = None
    if is_held(dataset.train, config, copies_on_node(team.size)):
        held = partial(team.together, partial(decode_all, dataset.train, config, "decoding the training images", stop))
    least = 2 * team.size  # size of the smallest batch that is trained on: BatchNorm needs two images of each rank
    labels = dataset.train.labels.to(ranks.device)
    example = torch.zeros(2, data.channels, data.resolution, data.resolution, device=ranks.device)
    parallel = ranks.compiled(team.wrap(network.train(), example))
    check = StopCheck(team, stop, checkpoint.due)
    log = EpochLog(log_file, team, ranks.device)
    log.restore(found.get("log", {}))
    with (
        batch_source(dataset.train, config, ranks.device, held) as fetch,
        progress("teacher: training", settings.epochs * batches, "updates") as advance,
    ):
        advance(done)
        for epoch in range(done // batches, settings.epochs):
            lr = optimizer.param_groups[0]["lr"]
            source = generator(settings.seed, "teacher", epoch)
            order = torch.randperm(count, generator=source)
            scale = (settings.crop_scale, 1.0)
            draws = augment.draw((count,), data.resolution, scale, settings.flip, 0, source).to(ranks.device)
            classes = labels[order.to(ranks.device)]
            left = bounds[done % batches :]
            pixels = fetch(order, [team.own(start, end) for start, end in left if end - start >= least])
            for start, end in left:
                stopping, saving = check()
                if stopping or saving:
                    save()
                if stopping:
                    raise Interrupted(f"teacher checkpointed after {done} of {settings.epochs * batches} updates")
                done += 1
                if end - start < least:
                    continue
                own = team.own(start, end)
                shown = augment.warp(normalize(next(pixels), data), draws[own])
                factor = team.size / (end - start)
                loss = update(parallel, optimizer, ranks, (shown, classes[own]), factor, settings.label_smoothing)
                log.count(loss, end - start)
                schedule.step()
                advance(1)
            log.end_epoch(epoch + 1, done, lr)
            log.write_if_due()
    save()
    return network.cpu()


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    batch: tuple[Tensor, Tensor],
    factor: float,
    smoothing: float,
) -> Tensor:
    """Do one update of the optimizer; return the loss summed over the images.

    Args:
        network: network in training mode.
        optimizer: optimizer of its weights.
        ranks: ranks of the job, with the precision.
        batch: normalized images [b, channels, H, W] and their classes [b].
        factor: factor on the sum whose gradient is taken.
        smoothing: label smoothing of the cross-entropy.
    """
    shown, wanted = batch
    with ranks.autocast():
        logits = network(shown)
    loss = functional.cross_entropy(logits.float(), wanted, label_smoothing=smoothing, reduction="sum")
    optimizer.zero_grad(set_to_none=True)
    (loss * factor).backward()
    optimizer.step()
    return loss


def optimizer_of(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that the config sets for a teacher."""
    settings = config.teacher
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        network.parameters(),
        settings.lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
