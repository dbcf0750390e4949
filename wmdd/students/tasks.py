"""The students of a run: their list, and the training length of each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wmdd.config.schema import Config, StudentConfig
from wmdd.data.image_parts import ImageParts
from wmdd.errors import InputError
from wmdd.networks import create
from wmdd.records.convergence import base_view
from wmdd.runtime.team import Team
from wmdd.students import soft_labels


@dataclass(frozen=True)
class StudentTask:
    """One student: architecture, label regime, seed, and view (training length and augmentation; ``student.views``)."""

    network: str
    regime: str
    seed: int
    view: str = "epochs"


def student_tasks(settings: StudentConfig, regimes: tuple[str, ...]) -> list[StudentTask]:
    """Return the students of a run: architectures × label regimes × views × seeds."""
    return [
        StudentTask(network, regime, seed, view)
        for network in settings.networks
        for regime in regimes
        for view in settings.views
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
    ]


def config_for_view(config: Config, view: str, images: int) -> Config:
    """Return the config of a student of a view, with the view's number of epochs and augmentation."""
    if base_view(view) == "updates":
        return config.replace(
            {"student.epochs": -(-update_count(config, view, images) // updates_per_epoch(config, images))}
        )
    if view != base_view(view):
        return config.replace({"student.epochs": 2 * config.student.epochs})
    if view == "plain":
        return config.replace({"labels.crop_scale": 1.0, "labels.flip": False, "labels.mix": "none"})
    return config


def update_count(config: Config, view: str, images: int) -> int:
    """Return the optimizer steps of one student on a set of ``images`` images."""
    whole = config.student.epochs * updates_per_epoch(config, images)
    once = config.student.updates if base_view(view) == "updates" else whole
    return once if view == base_view(view) else 2 * once


def checkpoint_bytes(config: Config, classes: int) -> int:
    """Return the size in bytes of the largest student's checkpoint: weights, average weights, AdamW's two moments."""
    copies = 4 if config.student.ema else 3
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in _outlines(config, classes)]
    return 4 * copies * max(sizes)


def _outlines(config: Config, classes: int) -> list[nn.Module]:
    """Build every student architecture once, without weights."""
    data = config.data
    with torch.device("meta"):
        return [create.create(name, classes, data.channels, data.resolution) for name in config.student.networks]


def updates_per_epoch(config: Config, images: int) -> int:
    """Return the optimizer steps of one epoch (``batches.batches``)."""
    size = config.student.batch_size
    return len(range(size, images - 1, size)) + 1


def reads_stored_labels(
    soft: soft_labels.SoftLabels, images: Tensor | ImageParts, epoch: int, team: Team, stop: Callable[[], bool]
) -> soft_labels.StoredLogits:
    """Return the logits of one epoch from its file, which is written first if it is missing."""

    # In a team each rank may write the file: all write the same bytes, to temporary files with different names.
    def write() -> None:
        if not soft.file(epoch).exists():
            soft.store(images, epoch, stop)

    team.together(write)
    return soft.read(epoch)


def check(config: Config, classes: int) -> None:
    """Build every student architecture once, and check the budget of stored labels.

    Raises:
        InputError: a network does not exist or cannot take images that small, ``labels.budget`` is too small, or a
            teacher with ``teacher_mode = batch`` would get a batch of one image.
    """
    images = classes * config.ipc
    for regime in config.labels.regimes:
        soft_labels.stored_epochs(config, regime, images, classes)
    if config.labels.teacher_mode == "batch" and min(config.student.batch_size, images) == 1:
        raise InputError(
            "labels.teacher_mode = batch: one image has no batch statistics; use larger batches, or teacher_mode=eval"
        )
    _outlines(config, classes)
