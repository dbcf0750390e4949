"""Distillation methods: where images start, what they are optimized against, which labels they carry.

A method is one small class; everything else (blocks, ranks, resume, students, reports) is shared. Methods of other
packages register in the entry-point group ``wmdd.methods``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmdd.config.schema import BarycenterConfig, Config, SynthesisConfig
from wmdd.data.dataset import Dataset
from wmdd.data.pixels import normalize
from wmdd.distill.statistics import ClassStatistics, Decode
from wmdd.distill.synthesis.objective import Objective
from wmdd.networks.frozen import Observation
from wmdd.runtime.seeding import generator

if TYPE_CHECKING:
    from wmdd.distill.barycenter.solve import Atoms  # imports POT, which takes more than a second


_DECODE_BATCH = 4
"""Number of images of one class that a process decodes at a time: few, because the method waits for all."""


@dataclass(frozen=True)
class ClassData:
    """The real images of one class, and the teacher's observations of them."""

    index: int
    name: str
    config: Config
    dataset: Dataset
    statistics: ClassStatistics | None
    """Class statistics; None for methods that set ``uses_statistics = False``"""
    observe: Callable[[Tensor], Observation]
    """Returns the teacher's observation, on the CPU, of normalized images [n, channels, H, W]"""
    atoms: "Atoms | None" = None
    """Barycenter of the class; None for methods whose ``barycenter`` returns None"""
    decoders: Decode | None = None
    """Decodes batches of the training images in the run's processes; None: in this process"""

    @property
    def count(self) -> int:
        """Number of real images of the class."""
        return len(self.dataset.train.of_class(self.index))

    def decode(self, positions: list[int]) -> Tensor:
        """Return the real images at these positions within the class, normalized: [n, channels, H, W] float32."""
        train = self.dataset.train
        images = train.of_class(self.index)
        chosen = [images[position] for position in positions]
        if self.decoders is None or train.is_decoded or not chosen:
            return normalize(train.decode(chosen), self.config.data)
        batches = [chosen[start : start + _DECODE_BATCH] for start in range(0, len(chosen), _DECODE_BATCH)]
        return normalize(torch.cat(list(self.decoders(batches))), self.config.data)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a random generator for one purpose, which depends on the run's seed and the class alone."""
        return generator(self.config.seed, purpose, self.name)


@dataclass(frozen=True)
class ClassPlan:
    """A method's decisions for the K images of one class."""

    images: Tensor
    """[K, channels, H, W] float32, normalized: start of the images; for a selection, the images themselves"""
    atoms: Tensor | None = None
    """[K, D] targets of the features; None for no feature term"""
    weights: Tensor | None = None
    """[K] weights that sum to one; None for equal weights"""
    labels: Tensor | None = None
    """[K] int64 class indices; None for the class itself"""
    w2: float | None = None
    """Squared Wasserstein-2 distance of the weighted atoms to the class's features"""


class Method(ABC):
    """Base of all methods; subclasses decide ``objective`` and ``prepare``."""

    uses_statistics = True
    """Whether ``prepare`` and ``objective`` need the class statistics (one pass of the teacher over the dataset)"""

    seeded = True
    """Whether another seed gives other images. False for a selection that depends on the dataset alone: the method
    then has a single set, which is not one draw of many"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def synthesis(self) -> SynthesisConfig:
        """Return the settings of the synthesis: the config's, or the method's published ones."""
        return self.config.synthesis

    def objective(self) -> Objective | None:
        """Return the objective of the synthesis; None keeps the images of ``prepare``."""
        return None

    def barycenter(self) -> BarycenterConfig | None:
        """Return the settings of the barycenter that ``prepare`` gets as ``data.atoms``; None for no barycenter.

        A barycenter of the features needs ``uses_statistics = True``. While one group is synthesized,
        ``compute.workers`` processes compute the barycenters of the next.
        """
        return None

    def check(self, dataset: Dataset) -> None:  # noqa: B027 - most methods take any dataset
        """Check that the method can use the dataset; called before any work starts.

        Raises:
            InputError: the method cannot use this dataset. The message gives the reason and the remedy.
        """

    @abstractmethod
    def prepare(self, data: ClassData) -> ClassPlan:
        """Return start, targets and labels of one class. Random numbers must come from ``data.generator`` alone."""
