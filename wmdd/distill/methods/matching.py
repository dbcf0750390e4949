"""WMDD and its ablations: images matched to barycenter atoms or class labels, and to BatchNorm moments."""

from dataclasses import replace

import torch

from wmdd.config.schema import BarycenterConfig, SynthesisConfig
from wmdd.distill.methods.base import ClassData, ClassPlan, Method
from wmdd.distill.methods.rded import best_crops
from wmdd.distill.synthesis.objective import Objective


class Wmdd(Method):
    """WMDD: features match the atoms of the class's Wasserstein barycenter, BatchNorm inputs match class moments."""

    def objective(self) -> Objective | None:
        """Return the weights and norms of the config."""
        return Objective.from_settings(self.synthesis())

    def barycenter(self) -> BarycenterConfig | None:
        """Return the config's settings, if features are matched to atoms or images start from real ones; else None.

        All methods of the ablation thus have the same start images, and differ only in their objective.
        """
        objective = self.objective()
        matched = objective is not None and objective.feature > 0
        return self.config.barycenter if matched or self.synthesis().start == "real" else None

    def prepare(self, data: ClassData) -> ClassPlan:
        """Start from noise, from the real images nearest to the atoms, or from the surest crops of real images."""
        atoms = data.atoms
        resolution, channels = self.config.data.resolution, self.config.data.channels
        if self.synthesis().start == "noise":
            shape = (self.config.ipc, channels, resolution, resolution)
            images = torch.randn(shape, generator=data.generator("start"))
        elif self.synthesis().start == "patch":
            images = best_crops(data, resolution, self.config.ipc)
        elif atoms is not None:
            images = data.decode(atoms.images.tolist())
        else:
            raise ValueError("a real start needs the barycenter of the class")
        if atoms is None:
            return ClassPlan(images)
        return ClassPlan(images, atoms.positions, atoms.weights.float(), w2=atoms.w2)


class StartOnly(Wmdd):
    """Ablation: the start images of the other methods, never optimized."""

    def objective(self) -> None:
        """Return None: the images are not optimized."""


class MeanMatching(Wmdd):
    """Ablation: the weighted mean of a class's features instead of its barycenter's atoms (DM, Zhao & Bilen 2023).

    Start images, weights and BatchNorm moments are those of ``wmdd``. Set ``synthesis.bn_weight=0`` to match the means
    of features alone.
    """

    def objective(self) -> Objective:
        """Return the config's objective with means of features."""
        return replace(Objective.from_settings(self.synthesis()), feature_mean=True)


class Noise(Wmdd):
    """Gaussian noise, never optimized: it shows what labels alone can teach, the floor of every comparison."""

    uses_statistics = False

    def synthesis(self) -> SynthesisConfig:
        """Return the config's settings with a start from noise."""
        return self.config.synthesis.replace({"start": "noise"})

    def objective(self) -> None:
        """Return None: the images are not optimized."""


class CrossEntropyClassBN(Wmdd):
    """Ablation: cross-entropy instead of the barycenter, per-class BatchNorm moments."""

    def objective(self) -> Objective:
        """Return the config's objective with the feature term replaced by cross-entropy."""
        chosen = Objective.from_settings(self.synthesis())
        return replace(chosen, feature=0.0, ce=chosen.ce or 1.0, per_class=True)


class BarycenterGlobalBN(Wmdd):
    """Ablation: the barycenter, with the teacher's running BatchNorm statistics."""

    def objective(self) -> Objective:
        """Return the config's objective with global BatchNorm targets."""
        return replace(Objective.from_settings(self.synthesis()), per_class=False)


class CrossEntropyGlobalBN(CrossEntropyClassBN):
    """Ablation: cross-entropy and running BatchNorm statistics, the objective of SRe2L (Yin et al. 2023)."""

    def objective(self) -> Objective:
        """Return cross-entropy with global BatchNorm targets."""
        return replace(super().objective(), per_class=False)
