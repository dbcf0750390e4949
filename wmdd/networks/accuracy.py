"""Accuracy of a classifier on the hold-out or test images, which are decoded once for all networks of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wmdd.config.schema import Config
from wmdd.data.batch_sources import copies_on_node, is_held
from wmdd.data.dataset import Dataset, decode_all, decoded_in_order
from wmdd.data.pixels import normalize
from wmdd.data.shards import Shards
from wmdd.errors import Interrupted, WmddError
from wmdd.runtime.ranks import Ranks
from wmdd.runtime.team import SINGLE, Team
from wmdd.storage import cache
from wmdd.storage.files import digest, locked, map_tensors, sweep, write_images

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
        dataset: dataset; its images are decoded to uint8 on first use. One rank of a node keeps them in memory. Several
            ranks of a node, or any rank with more images than ``data.memory_gb`` allows, map packed images, or one file
            in the cache, which the first rank writes.
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
        self._entry = cache.folder("images", digest([dataset.fingerprint, self.on]))

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
        read = self.reader()
        totals = torch.zeros(len(_METRICS), dtype=torch.float64)
        correct = torch.zeros(len(self._source), dtype=torch.float64)
        starts = range(0, len(self._source), _BATCH_SIZE)
        batches = list(zip(starts, self._source.labels.split(_BATCH_SIZE), correct.split(_BATCH_SIZE), strict=True))
        for start, labels, right in batches[team.rank :: team.size]:
            if self._stop():
                raise Interrupted(f"stopped while a network was validated on the {self.on} images")
            raw = read(start, start + len(labels))
            with torch.inference_mode(), self._ranks.autocast():
                shown = normalize(raw.to(self._ranks.device), self._config.data)
                logits = predict(shown.contiguous(memory_format=torch.channels_last)).float().cpu()
            ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), loss])
            right.copy_(ranked[:, 0])
        return torch.cat([totals, correct])

    def reader(self) -> Callable[[int, int], Tensor]:
        """Return a function that returns the images from one position to another: uint8 [n, channels, H, W]."""
        source, title = self._source, f"decoding the {self.on} images"
        alone = copies_on_node(self._ranks.size) == 1
        if self._images is None and alone and is_held(source, self._config, 1):
            self._images = decode_all(source, self._config, title, self._stop)
        if self._images is None and isinstance(source.catalogue, Shards):
            return lambda start, end: source.decode(range(start, end))
        if self._images is None:
            self._images = self._mapped(title)
        images = self._images
        return lambda start, end: images[start:end]

    def _mapped(self, title: str) -> Tensor:
        """Return the images of a mapped file in the cache, which is written first if it is missing."""
        file = self._entry / "images.safetensors"
        if not file.exists():
            cache.prepare(self._entry)
            with locked(self._entry / ".lock", self._stop):
                sweep(self._entry)
                if not file.exists():
                    parts = decoded_in_order(self._source, self._config, title, self._stop)
                    write_images(file, self._source.shape, parts)
        cache.note_use(self._entry)
        images: Tensor = map_tensors(file)["images"]
        if tuple(images.shape) != self._source.shape:
            raise WmddError(f"{file}: has images of shape {list(images.shape)}; delete this file")
        return images
