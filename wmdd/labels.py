"""What students learn from: augmented, mixed batches of distilled images and the teacher's labels for them (FKD).

Every batch of every epoch follows from the student's seed, so its soft labels can be computed online at no cost in
bytes, or stored and replayed (Shen & Xing 2022, "A Fast Knowledge Distillation Framework for Visual Recognition").
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wmdd import augment
from wmdd.config import Config, Labels
from wmdd.data import normalise
from wmdd.distilled import DistilledSet
from wmdd.distributed import ALONE, Ranks, Team, generator
from wmdd.encoding import decode, encode, row_bytes
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.files import digest, read_tensors, sweep, write_tensors
from wmdd.teacher import Teacher

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """How one update sees the distilled set."""

    images: Tensor
    """[b] int64, positions in the set"""
    draws: augment.Draws
    """crop and flip of each image"""
    partners: Tensor
    """[b] int64, position in the batch that each image is mixed with"""
    box: Tensor
    """[4] int64, the CutMix box: top, bottom, left, right; empty for other mixes"""
    share: float
    """λ, the share that an image keeps of itself"""


def batches(
    seed: int,
    epoch: int,
    count: int,
    size: int,
    batch_size: int,
    settings: Labels,
    device: torch.device = _CPU,
) -> list[Batch]:
    """Draw the batches of one epoch, on the CPU whatever the device, so that they are the same everywhere.

    Args:
        seed: of the student.
        epoch: from 0.
        count: images in the distilled set.
        size: height and width, in pixels.
        batch_size: images of one update; a rest of one image joins the batch before it (BatchNorm needs two).
        settings: crops, flips and mixing.
        device: where the batches shall lie: all are copied there at once, as every copy makes the host wait.
    """
    source = generator("student", seed, "epoch", epoch)
    order = torch.randperm(count, generator=source)
    draws = augment.draw((count,), size, (settings.crop_scale, 1.0), settings.flip, 0, source)
    cuts = list(range(batch_size, count - 1, batch_size))
    concentration = torch.full((len(cuts) + 1,), settings.mix_alpha)
    # Beta(α, α) as a ratio of Gammas, because torch.distributions takes no generator.
    gammas = [torch._standard_gamma(concentration, generator=source) for _ in range(2)]
    shares = gammas[0] / (gammas[0] + gammas[1])
    boxes = augment.mix_boxes(size, shares, source)
    if settings.mix == "cutmix":
        shares = 1 - ((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])) / size**2
    else:
        boxes = torch.zeros_like(boxes)
    if settings.mix == "none":
        shares = torch.ones_like(shares)
    rows = [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]
    partners = torch.cat([torch.randperm(piece.stop - piece.start, generator=source) for piece in rows]).to(device)
    order, draws, boxes = order.to(device), draws.to(device), boxes.to(device)
    return [
        Batch(order[piece], draws[piece], partners[piece], box, share)
        for piece, box, share in zip(rows, boxes, shares.tolist(), strict=True)
    ]


def view(images: Tensor, batch: Batch, config: Config) -> Tensor:
    """Return the batch as a student sees it: [b, channels, H, W] float32, cropped, flipped, mixed.

    Args:
        images: the whole set, [N, channels, H, W] uint8.
        batch: what to do; on the same device.
        config: normalisation and kind of mixing.
    """
    seen = augment.warp(normalise(images[batch.images], config.data), batch.draws)
    others = seen[batch.partners]
    if config.labels.mix == "cutmix":
        return torch.where(augment.inside(batch.box, seen.shape[-1]), others, seen)
    return seen if batch.share == 1 else batch.share * seen + (1 - batch.share) * others


class SoftLabels:
    """The teacher's logits for every batch of a student's training, online or stored.

    Stored logits lie in one file an epoch.  A student of the regime ``budget`` visits as many epochs as its budget pays
    for in turn; they are the first ones of ``stored``, and the same files.

    Args:
        config: of the run, as the student sees it (``student.seen``).
        distilled: the set.
        teacher: who labels.
        regime: ``soft``, ``stored`` or ``budget``.
        seed: of the student.
        ranks: device and precision.
        folder: where stored labels lie.

    Raises:
        InputError: the budget does not pay for one epoch.
    """

    def __init__(
        self,
        config: Config,
        distilled: DistilledSet,
        teacher: Teacher,
        regime: str,
        seed: int,
        ranks: Ranks,
        folder: Path,
    ) -> None:
        self._config, self._teacher, self._seed, self._ranks = config, teacher, seed, ranks
        self._predict = ranks.compiled(teacher.network.predict)
        self._count, self._classes = len(distilled), len(distilled.classes)
        self.stored = regime in STORED
        """Whether logits come from files"""
        self._epochs = stored_epochs(config, regime, self._count, self._classes) if self.stored else 0
        made_from = [distilled.sha256, teacher.sha256, config.fingerprint("labels"), ranks.arithmetic.facts, seed]
        self.identity = digest(made_from)
        """Names what these labels were made from"""
        self.folder = folder / self.identity[:16]
        if self.stored:
            sweep(self.folder)

    def online(self, views: Tensor, team: Team = ALONE) -> Tensor:
        """Return the teacher's logits [b / ranks, C] float32 for this rank's rows of a batch as the student sees it.

        With the statistics of the batch each rank labels all of it: a share would have others.
        """
        of_batch = self._config.labels.teacher_mode == "batch"
        with torch.inference_mode(), self._ranks.autocast():
            logits = self._predict(views if of_batch else team.shard(views), of_batch)
        return (team.shard(logits) if of_batch else logits).clone()  # outside: a loss may keep it for its gradient

    def file(self, epoch: int) -> Path:
        """Return the file of one epoch's logits."""
        return self.folder / f"epoch-{epoch:05d}.safetensors"

    def visited(self, epoch: int) -> int:
        """Return the epoch whose views and labels a student sees in this one."""
        return epoch % self._epochs if self.stored else epoch

    def store(self, images: Tensor, epoch: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Write one epoch's logits, in the order in which the epoch visits the images.

        Raises:
            Interrupted: a stop was requested; nothing of this epoch is written.
        """
        logits = []
        for batch in self._plan(epoch):
            if stop():
                raise Interrupted("stopped while soft labels were computed")
            logits.append(self.online(view(images, batch, self._config)))
        write_tensors(self.file(epoch), encode(torch.cat(logits), self._config.labels), {"labels": self.identity})

    def read(self, epoch: int) -> list[Tensor]:
        """Return one epoch's stored logits, float32, batch by batch.

        Raises:
            WmddError: the file is absent or damaged, or does not fit the set.
        """
        logits = decode(read_tensors(self.file(epoch)), self._classes)
        if len(logits) != self._count:
            raise WmddError(f"{self.file(epoch)}: holds labels of {len(logits)} images, the set has {self._count}")
        sizes = [len(batch.images) for batch in self._plan(epoch)]
        return [part.to(self._ranks.device) for part in logits.split(sizes)]

    def cost(self, labelled: int, team: Team = ALONE) -> dict[str, float]:
        """Return the bytes on disk and the FLOPs that the labels of a finished student took.

        ``label_bytes``: of the stored files, 0 online.  ``teacher_bytes``: of its weights, which online labels need
        beside the images.  ``labelling_flops``: of the teacher's forward passes over ``labelled`` views (stored: over
        each once), by every rank of the team where each labels whole batches.
        """
        files = [self.file(epoch) for epoch in range(self._epochs)]
        side, channels = self._config.data.resolution, self._config.data.channels
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            self._teacher.network.predict(torch.zeros(1, channels, side, side, device=self._ranks.device))
        passes = team.size if self._config.labels.teacher_mode == "batch" else 1
        views = self._epochs * self._count if self.stored else labelled * passes
        return {
            "label_bytes": float(sum(file.stat().st_size for file in files if file.exists())),
            "teacher_bytes": 0.0 if self.stored else float(self._teacher.facts.get("bytes", 0)),
            "labelling_flops": float(counter.get_total_flops() * views),
        }

    def _plan(self, epoch: int) -> list[Batch]:
        data, student = self._config.data, self._config.student
        recipe, device = self._config.labels, self._ranks.device
        return batches(self._seed, epoch, self._count, data.resolution, student.batch_size, recipe, device)


STORED = ("stored", "budget")
"""Regimes whose logits come from files"""
_HEADER = 512
"""Bytes that a file of logits holds besides them, at most."""


def stored_epochs(config: Config, regime: str, images: int, classes: int) -> int:
    """Return how many epochs of logits a student of a stored regime has on disk.

    Raises:
        InputError: ``labels.budget`` does not pay for one.
    """
    if regime != "budget":
        return config.student.epochs
    budget = config.labels.budget * images * config.data.channels * config.data.resolution**2
    epoch = epoch_bytes(config.labels, images, classes)
    if budget < epoch:
        raise InputError(
            f"labels.budget = {config.labels.budget:g} pays for {budget:,.0f} bytes, one epoch of logits takes"
            f" {epoch:,}; use labels.budget >= {config.labels.budget * epoch / budget:.2g}, or labels.encoding=topk"
        )
    return min(config.student.epochs, int(budget / epoch))


def epoch_bytes(settings: Labels, images: int, classes: int) -> int:
    """Return the bytes that one epoch of stored logits takes, at most."""
    return images * row_bytes(classes, settings) + _HEADER
