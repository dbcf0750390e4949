"""Accuracy of a classifier on the hold-out or test images, which are decoded once for all networks of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, decode_all
from wmdd.data.pixels import normalize
from wmdd.errors import Interrupted
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.team import SINGLE, Team

_BATCH_SIZE = 256


_METRICS = ("top1", "top5", "loss")


@dataclass(frozen=True)
class Judgement:
    """Accuracy of a classifier on the validation images."""

    metrics: dict[str, float]
    """``top1`` and ``top5`` (fractions), ``loss`` (mean cross-entropy)"""
    images: tuple[int, ...] = ()
    """Number of images of each class"""
    correct: Sequence[bool] = ()
    """Whether each image is classified correctly, class by class, in the dataset's order within a class"""


class Validation:
    """Measures classifiers on the hold-out if the config has one, else on the test set.

    Args:
        config: resolved config, for normalization and decoding workers.
        dataset: dataset; its images are decoded to uint8 on first use and kept.
        ranks: ranks of the job, with device and precision.
        stop: returns whether a stop was requested; checked between batches.
    """

    def __init__(
        self, config: Config, dataset: Dataset, ranks: Ranks, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._config, self._ranks, self._stop = config, ranks, stop
        self._source = dataset.validation
        self._images: Tensor | None = None
        self.on = "test" if dataset.holdout is None else "holdout"
        """``test`` or ``holdout``"""

    def __call__(self, predict: Callable[[Tensor], Tensor], team: Team = SINGLE) -> Judgement:
        """Return the accuracy of ``predict`` (images -> logits).

        The ranks of a team share the batches; all must call it.

        Raises:
            Interrupted: a stop was requested, on any rank of the team.
        """
        found = team.sum(team.together(lambda: self._found(predict, team)))
        labels = self._source.labels
        means = (found[: len(_METRICS)] / len(labels)).tolist()
        by_class = found[len(_METRICS) :][labels.argsort(stable=True)]
        counts = labels.bincount(minlength=len(self._source.classes))
        return Judgement(dict(zip(_METRICS, means, strict=True)), tuple(counts.tolist()), (by_class > 0).tolist())

    def _found(self, predict: Callable[[Tensor], Tensor], team: Team) -> Tensor:
        """Return [3 + N]: sums over this rank's batches of top-1 hits, top-5 hits and cross-entropy; then the top-1 hit
        (1 or 0) of each of the N images."""
        if self._images is None:
            title = f"decoding the {self.on} images"
            self._images = decode_all(self._source, self._config, title, self._stop)
        totals = torch.zeros(len(_METRICS), dtype=torch.float64)
        correct = torch.zeros(len(self._images), dtype=torch.float64)
        batches = list(zip(self._images.split(_BATCH_SIZE), self._source.labels.split(_BATCH_SIZE), strict=True))
        for (raw, labels), right in list(zip(batches, correct.split(_BATCH_SIZE), strict=True))[team.rank :: team.size]:
            if self._stop():
                raise Interrupted(f"stopped while a network was validated on the {self.on} images")
            with torch.inference_mode(), self._ranks.autocast():
                shown = normalize(raw.to(self._ranks.device), self._config.data)
                logits = predict(shown.contiguous(memory_format=torch.channels_last)).float().cpu()
            ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), loss])
            right.copy_(ranked[:, 0])
        return torch.cat([totals, correct])
