"""Baselines that select real images; the images are never optimized."""

from abc import abstractmethod

import torch
from torch import Tensor

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.methods.base import ClassData, ClassPlan, Method


class Random(Method):
    """K real images of each class, drawn without replacement: the baseline that every method must beat."""

    uses_statistics = False

    def prepare(self, data: ClassData) -> ClassPlan:
        """Draw the images."""
        order = torch.randperm(data.count, generator=data.generator("random"))
        return ClassPlan(data.decode(order[: self.config.ipc].tolist()))


class _Greedy(Method):
    """K real images chosen one after the other by their features; the choice does not depend on the seed."""

    seeded = False

    def prepare(self, data: ClassData) -> ClassPlan:
        """Choose the images."""
        return ClassPlan(data.decode(self.choose(_features(data), self.config.ipc)))

    @staticmethod
    @abstractmethod
    def choose(features: Tensor, count: int) -> list[int]:
        """Return ``count`` distinct rows of ``features`` [n, D], in the order in which they are chosen."""


class Herding(_Greedy):
    """K real images whose mean feature follows the class mean (herding, Welling 2009)."""

    @staticmethod
    def choose(features: Tensor, count: int) -> list[int]:
        """Choose K times the image that brings the mean of the chosen images nearest to the class mean.

        The weight vector is Welling's, w = (t + 1) μ − Σ x. The next image is the one at the least distance to it
        (Rebuffi et al. 2017, algorithm 4). Welling's largest inner product would favor long features. Ties go to the
        earlier image.
        """
        away = _centred(features)
        total, chosen = torch.zeros_like(away[0]), list[int]()
        for _ in range(count):
            distances = (total + away).square().sum(1)
            distances[chosen] = torch.inf
            chosen.append(int(distances.argmin()))
            total += away[chosen[-1]]
        return chosen


class KCenter(_Greedy):
    """K real images with every other image near one of them (greedy k-center, Sener & Savarese 2018)."""

    @staticmethod
    def choose(features: Tensor, count: int) -> list[int]:
        """Choose K times the image farthest from those chosen; the first is the one nearest to the class mean.

        A random first image would only add noise. From any start, greedy k-center is within a factor 2 of the least
        radius, and at IPC 1 the most typical image is the best choice. Ties go to the earlier image.
        """
        away = _centred(features)
        chosen = [int(away.square().sum(1).argmin())]
        distances = torch.full((len(away),), torch.inf, dtype=away.dtype)
        for _ in range(count - 1):
            distances = distances.minimum((away - away[chosen[-1]]).square().sum(1))
            distances[chosen] = -1.0  # a copy of a chosen image has distance 0, and is better than the image itself
            chosen.append(int(distances.argmax()))
        return chosen


class Medoids(Method):
    """K weighted real images with the least W2 to their class: the medoids of its optimal quantization (k-means).

    The atoms of k-means are replaced by distinct real images. The weight of an image is the share of the class that is
    nearest to it. Of several seeded starts, the one with the least W2² is kept. ``barycenter.starts`` and
    ``barycenter.rounds`` come from the config.
    """

    def barycenter(self) -> BarycenterConfig:
        """Return the settings of optimal quantization by medoids."""
        own = self.config.barycenter
        return BarycenterConfig(weights="free", atoms="medoids", starts=own.starts, rounds=own.rounds)

    def prepare(self, data: ClassData) -> ClassPlan:
        """Take the medoids."""
        atoms = data.atoms
        if atoms is None:
            raise ValueError("medoids need the barycenter of the class")
        return ClassPlan(data.decode(atoms.images.tolist()), weights=atoms.weights.float(), w2=atoms.w2)


def _features(data: ClassData) -> Tensor:
    if data.statistics is None:
        raise ValueError("a selection by features needs the class statistics")
    return data.statistics.features


def _centred(features: Tensor) -> Tensor:
    points = features.double()
    return points - points.mean(0)
