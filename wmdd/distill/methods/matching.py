"""WMDD and its ablations: images matched to barycenter atoms or class labels, and to BatchNorm moments."""

from dataclasses import replace

import torch

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.methods.base import ClassData, ClassPlan, Method
from wmdd.distill.synthesis.objective import Objective


class Wmdd(Method):
    """WMDD: features match the atoms of the class's Wasserstein barycenter, BatchNorm inputs match class moments."""

    def objective(self) -> Objective:
        """Return the weights and norms of the config."""
        return Objective.from_settings(self.synthesis())

    def barycenter(self) -> BarycenterConfig | None:
        """Return the config's settings; None without a feature term."""
        return self.config.barycenter if self.objective().feature else None

    def prepare(self, data: ClassData) -> ClassPlan:
        """Start from noise, or from the real images nearest to the atoms."""
        atoms = data.atoms
        resolution, channels = self.config.data.resolution, self.config.data.channels
        if self.synthesis().start == "noise":
            shape = (self.config.ipc, channels, resolution, resolution)
            images = torch.randn(shape, generator=data.generator("start"))
        elif atoms is not None:
            images = data.decode(atoms.images.tolist())
        else:
            images = data.decode(
                torch.randperm(data.count, generator=data.generator("start"))[: self.config.ipc].tolist()
            )
        if atoms is None:
            return ClassPlan(images)
        return ClassPlan(images, atoms.positions, atoms.weights.float(), w2=atoms.w2)


class CrossEntropyClassBN(Wmdd):
    """Ablation: cross-entropy instead of the barycenter, per-class BatchNorm moments."""

    def objective(self) -> Objective:
        """Return the config's objective with the feature term replaced by cross-entropy."""
        chosen = super().objective()
        return replace(chosen, feature=0.0, ce=chosen.ce or 1.0, per_class=True)


class BarycenterGlobalBN(Wmdd):
    """Ablation: the barycenter, with the teacher's running BatchNorm statistics."""

    def objective(self) -> Objective:
        """Return the config's objective with global BatchNorm targets."""
        return replace(super().objective(), per_class=False)


class CrossEntropyGlobalBN(CrossEntropyClassBN):
    """Ablation: cross-entropy and running BatchNorm statistics, the objective of SRe2L (Yin et al. 2023)."""

    def objective(self) -> Objective:
        """Return cross-entropy with global BatchNorm targets."""
        return replace(super().objective(), per_class=False)
