"""Baselines that select real images; they are never optimised."""

from abc import abstractmethod

import torch
from torch import Tensor

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.methods.base import ClassData, ClassPlan, Method


class Random(Method):
    """K real images of each class, drawn without replacement: the baseline every method must beat."""

    uses_statistics = False

    def prepare(self, data: ClassData) -> ClassPlan:
        """Draw the images."""
        order = torch.randperm(data.count, generator=data.generator("random"))
        return ClassPlan(data.decode(order[: self.config.ipc].tolist()))


class _Greedy(Method):
    """K real images chosen one after the other by their features; the same ones for every seed."""

    seeded = False

    def prepare(self, data: ClassData) -> ClassPlan:
        """Choose the images."""
        return ClassPlan(data.decode(self.choose(_features(data), self.config.ipc)))

    @staticmethod
    @abstractmethod
    def choose(features: Tensor, count: int) -> list[int]:
        """Return ``count`` distinct rows of ``features`` [n, D], in the order of their choice."""


class Herding(_Greedy):
    """K real images whose mean feature follows the class's (herding, Welling 2009)."""

    @staticmethod
    def choose(features: Tensor, count: int) -> list[int]:
        """Take, K times, the image with which the mean of those taken comes nearest to the class's mean.

        Welling's weight vector w = (t + 1) μ − Σ x, with the next image at the least distance to it (Rebuffi et al.
        2017, algorithm 4): his largest inner product would favour long features.  Ties go to the earlier image.
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
    """K real images that leave none far from all of them (greedy k-center, Sener & Savarese 2018)."""

    @staticmethod
    def choose(features: Tensor, count: int) -> list[int]:
        """Take, K times, the image farthest from those taken; the first is the nearest to the class's mean.

        A seeded first image would only add noise: greedy k-center is within a factor 2 of the least radius from any
        start, and at IPC 1 the most typical image is the one worth having.  Ties go to the earlier image.
        """
        away = _centred(features)
        chosen = [int(away.square().sum(1).argmin())]
        distances = torch.full((len(away),), torch.inf, dtype=away.dtype)
        for _ in range(count - 1):
            distances = distances.minimum((away - away[chosen[-1]]).square().sum(1))
            distances[chosen] = -1.0  # one that coincides with a taken image has distance 0
            chosen.append(int(distances.argmax()))
        return chosen


class Medoids(Method):
    """K real images of least W2 to their class, weighted: the medoids of its optimal quantisation (k-means).

    The atoms of free weights (k-means) are replaced by distinct real images, each weighs as many of the class as are
    nearest to it, and of several seeded starts the one with the least W2² is kept; ``barycenter.starts`` and
    ``barycenter.rounds`` are the config's.
    """

    def barycenter(self) -> BarycenterConfig:
        """Return the settings of optimal quantisation by medoids."""
        own = self.config.barycenter
        return BarycenterConfig(weights="free", atoms="medoids", starts=own.starts, rounds=own.rounds)

    def prepare(self, data: ClassData) -> ClassPlan:
        """Take the medoids."""
        atoms = data.atoms
        if atoms is None:
            raise ValueError("medoids are a choice by the barycenter")
        return ClassPlan(data.decode(atoms.images.tolist()), weights=atoms.weights.float(), w2=atoms.w2)


def _features(data: ClassData) -> Tensor:
    if data.statistics is None:
        raise ValueError("a choice by features needs the class statistics")
    return data.statistics.features


def _centred(features: Tensor) -> Tensor:
    points = features.double()
    return points - points.mean(0)
