"""Baselines that select real images; they are never optimised."""

import torch

from wmdd.methods import ClassData, Method, Plan


class Random(Method):
    """K real images of each class, drawn without replacement: the baseline every method must beat."""

    uses_statistics = False

    def prepare(self, data: ClassData) -> Plan:
        """Draw the images."""
        order = torch.randperm(data.count, generator=data.generator("random"))
        return Plan(data.decode(order[: self.config.ipc].tolist()))
