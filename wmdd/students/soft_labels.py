"""Soft labels: the teacher's logits, online or stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmdd.config.schema import Config, LabelsConfig
from wmdd.data.image_parts import ImageParts, to_device
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.runs.distilled_set import DistilledSet, MappedSet
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.team import SINGLE, Team
from wmdd.storage.files import digest, map_tensors, sweep, write_tensors
from wmdd.students.batches import Batch, augmented_batch, batch_rows, batches
from wmdd.students.logit_files import decode, encode, row_bytes
from wmdd.teacher.obtain import Teacher


class SoftLabels:
    """The teacher's logits for every batch of a student's training, online or stored.

    Stored logits have one file per epoch. A student of the regime ``budget`` has files for as many epochs as its budget
    allows, and visits them in turn. They are the first files of the regime ``stored``.

    Args:
        config: config of the run for this student's view (``tasks.config_for_view``).
        distilled: distilled set to label.
        teacher: teacher that labels.
        regime: ``soft``, ``stored`` or ``budget``.
        seed: random seed of the student.
        ranks: ranks of the job, with device and precision.
        folder: parent folder of the stored labels.

    Raises:
        InputError: the budget is smaller than one epoch of labels.
    """

    def __init__(
        self,
        config: Config,
        distilled: DistilledSet | MappedSet,
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
        """Whether the logits are read from files"""
        self._epochs = stored_epochs(config, regime, self._count, self._classes) if self.stored else 0
        made_from = [distilled.sha256, teacher.sha256, config.fingerprint("labels"), ranks.arithmetic.facts, seed]
        self.identity = digest(made_from)
        """Digest of all that decides these labels"""
        self.folder = folder / self.identity[:16]
        if self.stored:
            sweep(self.folder)

    def online(self, views: Tensor, team: Team = SINGLE) -> Tensor:
        """Return the teacher's logits [b / ranks, C] float32 for this rank's rows of an augmented batch.

        With ``labels.teacher_mode = batch`` every rank labels the whole batch: a part has other statistics.
        """
        of_batch = self._config.labels.teacher_mode == "batch"
        with torch.inference_mode(), self._ranks.autocast():
            logits = self._predict(views if of_batch else team.shard(views), of_batch)
        return (
            team.shard(logits) if of_batch else logits
        ).clone()  # a clone made outside of inference mode, so that a loss can keep it for its gradient

    def file(self, epoch: int) -> Path:
        """Return the file of one epoch's logits."""
        return self.folder / f"epoch-{epoch:05d}.safetensors"

    def source_epoch(self, epoch: int) -> int:
        """Return the epoch whose views and labels a student gets in epoch ``epoch``."""
        return epoch % self._epochs if self.stored else epoch

    def store(self, images: Tensor | ImageParts, epoch: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Write one epoch's logits, in the order in which the epoch visits the images.

        Raises:
            Interrupted: a stop was requested. No file was written.
        """
        encoded: list[dict[str, Tensor]] = []
        for batch in self._plan(epoch):
            if stop():
                raise Interrupted("stopped while soft labels were computed")
            logits = self.online(augmented_batch(images, batch, self._config))
            encoded.append({name: part.cpu() for name, part in encode(logits, self._config.labels).items()})
        joined = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
        write_tensors(self.file(epoch), joined, {"labels": self.identity})

    def read(self, epoch: int) -> "StoredLogits":
        """Return one epoch's stored logits.

        Raises:
            WmddError: the file is absent or damaged, or does not fit the set.
        """
        stored = map_tensors(self.file(epoch))
        if any(len(part) != self._count for part in stored.values()):
            found = len(next(iter(stored.values())))
            raise WmddError(f"{self.file(epoch)}: contains labels of {found} images, the set has {self._count}")
        rows = batch_rows(self._count, self._config.student.batch_size)
        return StoredLogits(stored, rows, self._classes, self._ranks.device)

    def cost(self, labelled: int, team: Team = SINGLE) -> dict[str, float]:
        """Return the bytes on disk and the FLOPs of the labels of a finished student.

        - ``label_bytes``: size of the stored files; 0 for online labels.
        - ``teacher_bytes``: size of the teacher's weights, which online labels need in addition to the images; else 0.
        - ``labelling_flops``: FLOPs of the teacher's forward passes over ``labelled`` views. Stored views are labeled
          once. Every rank counts if each labels whole batches.
        """
        from torch.utils.flop_counter import FlopCounterMode  # imports triton, which is slow

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


@dataclass(frozen=True)
class StoredLogits(Sequence[Tensor]):
    """The logits of one epoch, which stay encoded in their file.  Item i is decoded on access: [b, C] float32."""

    stored: Mapping[str, Tensor]
    """Encoded logits, memory-mapped (``logit_files.encode``)"""
    rows: Sequence[slice]
    """Rows of each batch"""
    classes: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        own = {name: part[self.rows[position]] for name, part in self.stored.items()}
        return to_device(decode(own, self.classes), self.device)


STORED = ("stored", "budget")
"""Regimes whose logits are read from files"""


_HEADER_BYTES = 512
"""Largest size of the header of a file of logits."""


def stored_epochs(config: Config, regime: str, images: int, classes: int) -> int:
    """Return the number of epochs of logits that a student of a stored regime has on disk.

    Raises:
        InputError: ``labels.budget`` is smaller than one epoch.
    """
    if regime != "budget":
        return config.student.epochs
    budget = config.labels.budget * images * config.data.channels * config.data.resolution**2
    epoch = epoch_bytes(config.labels, images, classes)
    if budget < epoch:
        raise InputError(
            f"labels.budget = {config.labels.budget:g} allows {budget:,.0f} bytes, but one epoch of logits takes"
            f" {epoch:,}; use labels.budget >= {config.labels.budget * epoch / budget:.2g}, or labels.encoding=topk"
        )
    return min(config.student.epochs, int(budget / epoch))


def epoch_bytes(settings: LabelsConfig, images: int, classes: int) -> int:
    """Return the largest size of one epoch of stored logits, in bytes."""
    return images * row_bytes(classes, settings) + _HEADER_BYTES
