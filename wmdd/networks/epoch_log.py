"""One JSON line for each epoch of a training, for people and plots; nothing is decided by it."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmdd.runtime.team import Team

_WRITE_SECONDS = 1.0
"""Seconds between two writes: a write makes the host wait for the device, and some epochs are a single update."""


class EpochLog:
    """Writes the course of one training to a file.

    Fields of a line: ``epoch`` (epochs done), ``updates`` (optimizer steps done), ``lr`` (at its start),
    ``loss`` (mean over its training images; null if it is not finite), ``seconds`` (by the host's clock, which may run
    ahead of a GPU by some updates) and ``images_per_second``; where the epoch was validated also ``validation_top1``,
    ``validation_top5`` (fractions) and ``validation_loss``.

    A training that resumes from a checkpoint repeats the epochs after it.  One that stops while it is validated writes
    the two halves of a line apart.  So of all lines of an epoch, the last value of each field holds.  A line that a
    kill cut short is not JSON and is repeated.  A training from the start replaces the file.

    Args:
        path: file to write; None: none.  It may be deleted at any time.  A full disk stops no training.
        team: ranks that train together; the first one writes.
        device: device of the losses.
    """

    def __init__(self, path: Path | None, team: Team, device: torch.device) -> None:
        self._path = path if team.rank == 0 else None
        self._team = team
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._images = 0
        self._waiting: dict[int, dict[str, Any]] = {}
        self._begun = self._written = time.monotonic()

    def restore(self, found: Mapping[str, Any]) -> None:
        """Continue after a checkpoint (``state``), or begin a new file if there was none."""
        if not found:
            if self._path:
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            return
        if self._team.rank == 0:
            self._loss.copy_(found["loss"])
        self._images = found["images"]
        self._begun = time.monotonic() - found["seconds"]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint within an epoch has to keep of it; all ranks of the team call it.

        What waits is written: a training that resumes here does not repeat it.
        """
        self.write()
        return {
            "loss": self._team.sum(self._loss),
            "images": self._images,
            "seconds": time.monotonic() - self._begun,
        }

    def count(self, loss: Tensor, images: int) -> None:
        """Add an update of the current epoch.

        Args:
            loss: sum over this rank's images, on the device; it is not read here.
            images: number of images of the batch, over all ranks of the team.
        """
        self._loss += loss.detach()
        self._images += images

    def end_epoch(self, epoch: int, updates: int, lr: float) -> None:
        """End an epoch; all ranks of the team call it.  One without updates has no line."""
        if not self._images:
            return
        now = time.monotonic()
        self._add(
            epoch,
            updates=updates,
            lr=lr,
            loss=self._team.sum(self._loss) / self._images,
            seconds=round(now - self._begun, 4),
            images_per_second=round(self._images / max(1e-9, now - self._begun), 1),
        )
        self._loss, self._images, self._begun = torch.zeros_like(self._loss), 0, now

    def add_validation(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add how the network was validated after an epoch; the time that this took belongs to no epoch."""
        self._add(epoch, **{f"validation_{key}": value for key, value in metrics.items()})
        self._begun = time.monotonic()

    def write_if_due(self) -> None:
        """Write what waits, about once a second."""
        if time.monotonic() - self._written >= _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what waits."""
        lines = list(self._waiting.values())
        self._waiting = {}
        if self._path and lines:
            losses = [line["loss"] for line in lines if "loss" in line]
            read = iter(torch.stack(losses).tolist() if losses else [])
            for line in lines:
                line.update({key: next(read) for key in ("loss",) if key in line})
            text = "".join(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n" for line in lines)
            with suppress(OSError):
                _append(self._path, text)
        self._written = time.monotonic()

    def _add(self, epoch: int, **facts: Any) -> None:
        self._waiting.setdefault(epoch, {"epoch": epoch}).update(facts)


def _finite(value: Any) -> Any:
    """Return a value as JSON can hold it: a loss that diverged is null."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab+") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # cut short by a kill
                text = f"\n{text}"
        file.write(text.encode())
