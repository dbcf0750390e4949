"""Distillation methods: where images start, what they are optimised against, which labels they carry.

A method is one small class; everything else (blocks, ranks, resume, students, reports) is shared.  Methods of other
packages register in the entry-point group ``wmdd.methods``.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch
from torch import Tensor

from wmdd.barycenter import Atoms
from wmdd.config import Barycenter, Config, Synthesis
from wmdd.data import Dataset, normalise
from wmdd.distributed import generator
from wmdd.errors import InputError, nearest
from wmdd.networks import Observation
from wmdd.statistics import ClassStatistics
from wmdd.synthesis import Objective

REGISTRY = {
    "wmdd": "wmdd.methods.matching:Wmdd",
    "ce-pcbn": "wmdd.methods.matching:CrossEntropyClassBN",
    "barycenter-global": "wmdd.methods.matching:BarycenterGlobalBN",
    "ce-global": "wmdd.methods.matching:CrossEntropyGlobalBN",
    "sre2l": "wmdd.methods.sre2l:SRe2L",
    "cda": "wmdd.methods.sre2l:CDA",
    "random": "wmdd.methods.selection:Random",
    "herding": "wmdd.methods.selection:Herding",
    "k-center": "wmdd.methods.selection:KCenter",
    "medoids": "wmdd.methods.selection:Medoids",
    "rded": "wmdd.methods.rded:RDED",
    "external": "wmdd.methods.external:Imported",
}
"""Shipped methods: name -> ``module:Class``; resolved when asked for."""


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
    atoms: Atoms | None = None
    """Barycenter of the class; None for methods whose ``barycenter`` asks for none"""

    @property
    def count(self) -> int:
        """Number of real images of the class."""
        return len(self.dataset.train.of_class(self.index))

    def decode(self, positions: list[int]) -> Tensor:
        """Return the real images at these positions within the class, normalised: [n, channels, H, W] float32."""
        images = list(self.dataset.train.of_class(self.index))
        return normalise(self.dataset.train.decode([images[position] for position in positions]), self.config.data)

    def generator(self, purpose: str) -> torch.Generator:
        """Return random numbers of this class for one purpose, whatever else is computed beside it."""
        return generator(self.config.seed, purpose, self.name)


@dataclass(frozen=True)
class Plan:
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

    def __init__(self, config: Config) -> None:
        self.config = config

    def synthesis(self) -> Synthesis:
        """Return the settings of the engine: the config's, or what the method is known for."""
        return self.config.synthesis

    def objective(self) -> Objective | None:
        """Return what the images are optimised for; None leaves them as ``prepare`` made them."""
        return None

    def barycenter(self) -> Barycenter | None:
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
    def prepare(self, data: ClassData) -> Plan:
        """Return start, targets and labels of one class; random numbers come from ``data.generator`` alone."""


def names() -> list[str]:
    """Return the names of all methods, those of plug-ins included."""
    return sorted({*REGISTRY, *(point.name for point in entry_points(group="wmdd.methods"))})


def create(config: Config, name: str | None = None) -> Method:
    """Return the method that the config names (or ``name``).

    Raises:
        InputError: no such method; the message offers the nearest.
    """
    wanted = name or config.method
    plugins = {point.name: point for point in entry_points(group="wmdd.methods")}
    if wanted in REGISTRY:
        module, _, attribute = REGISTRY[wanted].partition(":")
        made = getattr(importlib.import_module(module), attribute)(config)
    elif wanted in plugins:
        made = plugins[wanted].load()(config)
    else:
        raise InputError(f"method = {wanted!r}: no such method; {nearest(wanted, names())}")
    if not isinstance(made, Method):
        raise InputError(f"method {wanted!r}: {type(made).__name__} is no subclass of wmdd.methods.Method")
    return made
