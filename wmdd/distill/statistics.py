"""Class statistics: features and exact per-class BatchNorm moments, from one pass over the real images."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wmdd.config.schema import Config
from wmdd.data import augment
from wmdd.data.dataset import Dataset
from wmdd.data.image_parts import to_device
from wmdd.data.pixels import normalize
from wmdd.errors import Interrupted
from wmdd.runtime.arithmetic import ENGINE, Arithmetic
from wmdd.runtime.seeding import generator
from wmdd.session import Session
from wmdd.storage import cache
from wmdd.storage.files import digest, read_metadata, read_tensors, sweep, write_tensors


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations (M2) of vectors, merged exactly.

    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983), eq. 2.1.
    """

    count: int
    mean: Tensor
    """[M] float64"""
    m2: Tensor
    """[M] float64"""

    @staticmethod
    def from_rows(values: Tensor) -> "Moments":
        """Return the moments of the rows of ``values`` [n, M]."""
        values = values.double()
        mean = values.mean(0)
        return Moments(len(values), mean, (values - mean).square().sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of rows together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta.square() * (self.count * other.count / count),
        )


@dataclass(frozen=True)
class ClassStatistics:
    """Features and BatchNorm moments of the n real images of one class.

    The variance of a BatchNorm input over images and positions is ``within + between``. ``within`` is the mean of the
    images' variances, ``between`` the variance of their means. Both are biased.
    """

    features: Tensor
    """[n, D] float32"""
    mean: Tensor
    """[M] float32, mean over images and positions"""
    within: Tensor
    """[M] float32"""
    between: Tensor
    """[M] float32"""
    seconds: float = 0.0
    """Wall-clock seconds of the pass over the images, in the process that measured them"""

    def variance(self, weights: Tensor, matched: bool) -> Tensor:
        """Return the target variance [M] of K images.

        Args:
            weights: weights [K] of the images, which sum to one.
            matched: False for the total variance of the class. True for the mean variance of K independent images of
                the class, ``within + (1 − Σ w²) between``: a single image has no variance between images.
        """
        share = 1 - weights.square().sum().item() if matched else 1.0
        return self.within + share * self.between


Decode = Callable[[Sequence[Sequence[int]]], Iterator[Tensor]]
"""Decodes batches of images, by their positions: uint8 [b, channels, H, W] each"""


StatisticsByClass = Mapping[int, ClassStatistics]
"""Statistics of each class, by class index; empty for methods that use none"""


def summarize(features: Sequence[Tensor], moments: Sequence[tuple[Tensor, Tensor]], between: str) -> ClassStatistics:
    """Combine the batches of one class, in order, on their device and in float64.

    Args:
        features: features of each batch, [b, D].
        moments: per-image means and variances of each batch, both [b, M].
        between: ``exact``: variance over the class; ``batchwise``: mean of the batches' variances, as in the public
            code.
    """
    parts = [Moments.from_rows(means) for means, _ in moments]
    inner = [Moments.from_rows(variances) for _, variances in moments]
    total, within = parts[0], inner[0]
    for part, spread in zip(parts[1:], inner[1:], strict=True):
        total, within = total.merge(part), within.merge(spread)
    if between == "exact":
        inside, across = within.mean, total.m2 / total.count
    else:
        inside = torch.stack([part.mean for part in inner]).mean(0)
        across = torch.stack([part.m2 / part.count for part in parts]).mean(0)
    return ClassStatistics(torch.cat(list(features)).float(), total.mean.float(), inside.float(), across.float())


def key(config: Config, dataset: Dataset, teacher: str, arithmetic: Arithmetic) -> str:
    """Return the cache key for the statistics of a dataset under a teacher (its SHA-256), in one arithmetic."""
    synthesis = config.synthesis
    parts = {
        "teacher": teacher,
        "data": dataset.fingerprint,
        "settings": config.fingerprint("statistics"),
        "arithmetic": arithmetic.facts | {"engine": ENGINE},
        "augment": [config.seed, synthesis.crop_scale, synthesis.flip] if config.statistics.augment else None,
    }
    return digest(parts)


def measure(
    session: Session,
    classes: Sequence[int],
    advance: Callable[[int], None] = lambda images: None,
    decode: Decode | None = None,
) -> Iterator[tuple[int, ClassStatistics]]:
    """Return (class index, statistics) in the order of ``classes``, from the cache or from one pass over their images.

    The call starts the decoders on the images of all classes that the cache lacks; the pass follows the iteration.
    Every batch holds images of one class, and its size is the config's. The result therefore does not depend on ranks
    or blocks.

    Args:
        session: session of the run.
        classes: indices of the classes to measure.
        advance: called with the number of images done.
        decode: decodes batches of the training images; None starts processes for these classes alone.

    Raises:
        Interrupted: a stop was requested between two batches. The statistics of finished classes stay in the cache.
    """
    sha, arithmetic = session.teacher.sha256, session.ranks.arithmetic
    folder = cache.folder("statistics", key(session.config, session.dataset, sha, arithmetic))
    paths = {index: folder / f"{index:05d}.safetensors" for index in classes}
    # A damaged file has no metadata, so its class is measured again. Tensors are read one class at a time: those of
    # all of ImageNet take gigabytes.
    known = {index: read_metadata(path).get("seconds") for index, path in paths.items()}
    missing = [index for index, seconds in known.items() if seconds is None]
    if missing:
        cache.prepare(folder)
        sweep(folder)
    cache.note_use(folder)
    plan = {index: _batches(session, index) for index in missing}
    every = [batch for batches in plan.values() for batch in batches]
    decoded = decode(every) if decode else session.dataset.train.batches(every, session.config.compute.workers)

    def found() -> Iterator[tuple[int, ClassStatistics]]:
        for index in classes:
            seconds = known[index]
            if seconds is None:
                begun = time.perf_counter()
                measured = _compute(session, index, itertools.islice(decoded, len(plan[index])), advance)
                measured = replace(measured, seconds=round(time.perf_counter() - begun, 4))
                tensors = {name: value for name, value in vars(measured).items() if isinstance(value, Tensor)}
                write_tensors(paths[index], tensors, {"seconds": str(measured.seconds)})
            else:
                measured = ClassStatistics(**read_tensors(paths[index]), seconds=float(seconds))
                advance(len(measured.features))
            yield index, measured

    return found()


def _batches(session: Session, index: int) -> list[range]:
    """Return the positions of the images of a class, batch by batch."""
    images, size = session.dataset.train.of_class(index), session.config.statistics.batch_size
    return [images[start : start + size] for start in range(0, len(images), size)]


def _compute(
    session: Session, index: int, decoded: Iterable[Tensor], advance: Callable[[int], None]
) -> ClassStatistics:
    config, ranks = session.config, session.ranks
    source = generator(config.seed, "statistics", session.dataset.classes[index])
    features: list[Tensor] = []
    moments: list[tuple[Tensor, Tensor]] = []
    for batch in decoded:
        if session.stop():
            raise Interrupted("stopped while class statistics were measured")
        shown = normalize(to_device(batch, ranks.device), config.data)
        if config.statistics.augment:
            shown = augment.warp(shown, _draws(config, len(shown), source).to(ranks.device))
        seen = session.teacher.observe_on_device(shown, ranks, config.statistics.batch_size)
        features.append(seen.features)
        moments.append((seen.means, seen.variances))
        advance(len(shown))
    return _on_cpu(summarize(features, moments, config.statistics.between))


def _on_cpu(found: ClassStatistics) -> ClassStatistics:
    return found if found.mean.device.type == "cpu" else copied_at_once(found)


def copied_at_once(found: ClassStatistics) -> ClassStatistics:
    """Return statistics on the CPU. One copy moves all tensors, because the host waits for each copy."""
    tensors = [found.features, found.mean, found.within, found.between]
    moved = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return ClassStatistics(*(flat.clone().view(old.shape) for flat, old in zip(moved, tensors, strict=True)))


def _draws(config: Config, count: int, source: torch.Generator) -> augment.Draws:
    synthesis = config.synthesis
    return augment.draw((count,), config.data.resolution, synthesis.crop_scale, synthesis.flip, 0, source)
