"""Distillation methods: where images start, what they are optimised against, which labels they carry.

A method is one small class; everything else (blocks, ranks, resume, students, reports) is shared.  Methods of other
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
from wmdd.distill.statistics import ClassStatistics
from wmdd.distill.synthesis.objective import Objective
from wmdd.networks.frozen import Observation
from wmdd.runtime.seeding import generator

if TYPE_CHECKING:
    from wmdd.distill.barycenter.solve import Atoms  # and with it POT, which takes more than a second


@dataclass(frozen=True)
class ClassData:
    """The real images of one class, and what the teacher saw in them."""

    index: int
    name: str
    config: Config
    dataset: Dataset
    statistics: ClassStatistics | None
    """None for methods that set ``uses_statistics = False``"""
    observe: Callable[[Tensor], Observation]
    """What the teacher sees in normalised images [n, channels, H, W]; the observation lies on the CPU"""
    atoms: "Atoms | None" = None
    """Barycenter of the class; None for methods whose ``barycenter`` asks for none"""

    @property
    def count(self) -> int:
        """Number of real images of the class."""
        return len(self.dataset.train.of_class(self.index))

    def decode(self, positions: list[int]) -> Tensor:
        """Return the real images at these positions within the class, normalised: [n, channels, H, W] float32."""
        images = list(self.dataset.train.of_class(self.index))
        return normalize(self.dataset.train.decode([images[position] for position in positions]), self.config.data)

    def generator(self, purpose: str) -> torch.Generator:
        """Return random numbers of this class for one purpose, whatever else is computed beside it."""
        return generator(self.config.seed, purpose, self.name)


@dataclass(frozen=True)
class ClassPlan:
    """What a method decides for the K images of one class."""

    images: Tensor
    """[K, channels, H, W] float32, normalised: where the images start (a selection: where they stay)"""
    atoms: Tensor | None = None
    """[K, D] targets of the features, if there are any"""
    weights: Tensor | None = None
    """[K] weights that sum to one; None for equal ones"""
    labels: Tensor | None = None
    """[K] int64 class indices; None for the class itself"""
    w2: float | None = None
    """Squared Wasserstein-2 distance of the weighted atoms to the class's features"""


class Method(ABC):
    """Base of all methods; subclasses decide ``objective`` and ``prepare``."""

    uses_statistics = True
    """Whether ``prepare`` and ``objective`` need the class statistics (one pass of the teacher over the data)"""

    seeded = True
    """Whether another seed gives other images. False for a choice that the data alone decide: its one set is then all
    that there is of the method, and not one draw of many"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def synthesis(self) -> SynthesisConfig:
        """Return the settings of the engine: the config's, or what the method is known for."""
        return self.config.synthesis

    def objective(self) -> Objective | None:
        """Return what the images are optimised for; None leaves them as ``prepare`` made them."""
        return None

    def barycenter(self) -> BarycenterConfig | None:
        """Return the settings of the barycenter that ``prepare`` finds in ``data.atoms``; None for none.

        It is of the features, and so needs ``uses_statistics``.  While one group of classes is synthesised, those of
        the next are computed by ``compute.workers`` processes.
        """
        return None

    def check(self, dataset: Dataset) -> None:  # noqa: B027 - most methods take any data set
        """Refuse what could only fail later; called before any work starts.

        Raises:
            InputError: the method cannot work on this data set; the message says why, and what would help.
        """

    @abstractmethod
    def prepare(self, data: ClassData) -> ClassPlan:
        """Return start, targets and labels of one class; random numbers come from ``data.generator`` alone."""
