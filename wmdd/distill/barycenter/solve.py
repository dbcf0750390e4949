"""The atoms that stand for a class: Wasserstein-2 barycenter of its features, by uniform or free weights.

The barycenter of *one* measure μ, the uniform measure on a class's features x_1..x_n, is its best approximation by K
atoms: the least W2²(Σ w_k δ_{b_k}, μ), the squared Wasserstein-2 distance for the cost ‖b − x‖². With free weights that
is optimal quantisation (k-means), with weights 1/K balanced k-means. Neither is convex: every solver descends from
several seeded starts, and the least W2² is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from threadpoolctl import ThreadpoolController

from wmdd.config.schema import BarycenterConfig
from wmdd.distill.barycenter.free import alternating, lloyd
from wmdd.distill.barycenter.starts import Array, Candidate, Cloud, draw_starts, standardized
from wmdd.distill.barycenter.uniform import ARC_REACH, MAX_PIVOTS, descend, optimal
from wmdd.errors import InputError, WmddError

Solved = tuple[Array, Array, NDArray[np.int64], float]


@dataclass(frozen=True)
class Atoms:
    """K weighted points in feature space, and how well they stand for the class."""

    positions: torch.Tensor
    """[K, D] float32: the atoms b."""
    weights: torch.Tensor
    """[K] float64: their weights w, positive, of sum 1."""
    images: torch.Tensor
    """[K] int64: distinct rows of the features, assigned to the atoms at the least total squared distance."""
    w2: float
    """Squared Wasserstein-2 distance to the class, of these very positions and weights; squared feature units."""


def barycenter(features: torch.Tensor, count: int, settings: BarycenterConfig, seed: int) -> Atoms:
    """Approximate the uniform measure on ``features`` by ``count`` atoms (WMDD, step 1; Cuturi & Doucet 2014).

    Computes in float64 on one thread, because sums shared between threads would differ in their last bits: on one
    machine, the same input gives the same bytes.

    Args:
        features: [n, D], on the CPU, finite.
        count: number K of atoms.
        settings: weights, kind of atoms, starts and rounds.
        seed: of all random numbers; at least 0.

    Returns:
        The atoms; for K = n the features themselves.

    Raises:
        InputError: K is below 1, or above n.
        WmddError: a feature is not finite.
    """
    with _libraries().limit(limits=1):
        return atoms_of(*checked(features.detach().numpy(), count, settings, seed))


def w2_squared(features: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the exact squared Wasserstein-2 distance between weighted atoms and uniformly weighted features (ot.emd2).

    Args:
        features: [n, D].
        positions: [K, D].
        weights: [K], of sum 1.

    Returns:
        W2², in squared feature units.
    """
    with _libraries().limit(limits=1):
        cost = ot.dist(positions.double().numpy(), features.double().numpy())
        return _transport(weights.double().numpy(), cost)


def starts(points: Array, count: int, number: int, seed: int) -> list[Array]:
    """Draw start positions from the data: k-means++, then K random points, and so on by turns.

    k-means++ spreads the atoms out, which serves free weights; random points follow the density, which serves uniform
    ones. A larger ``number`` keeps the starts of a smaller one.

    Args:
        points: [n, D].
        count: number K of atoms, at most n.
        number: starts to draw.
        seed: at least 0.

    Returns:
        ``number`` arrays [K, D].
    """
    return [points[rows] for rows in draw_starts(standardized(points).data, count, number, seed)]


@cache
def _libraries() -> ThreadpoolController:
    """Find the libraries that have threads once: the search takes as long as a tenth of a class."""
    return ThreadpoolController()


def atoms_of(positions: Array, weights: Array, nearest: NDArray[np.int64], w2: float) -> Atoms:
    """Return the atoms of a class as tensors."""
    return Atoms(torch.from_numpy(positions).float(), torch.from_numpy(weights), torch.from_numpy(nearest).long(), w2)


def checked(features: NDArray[np.floating], count: int, settings: BarycenterConfig, seed: int) -> Solved:
    """Return positions, weights, nearest images and W2² of the best start, once the features are known to be fit."""
    images = len(features)
    if not 1 <= count <= images:
        raise InputError(f"ipc: {count} atoms asked of a class of {images} images; give a number from 1 to {images}")
    if not np.isfinite(features).all():
        raise WmddError("features: NaN or infinity among the class's features; is the teacher's training sound?")
    return _solved(features.astype(np.float64), count, settings, seed)


def _solved(points: Array, count: int, settings: BarycenterConfig, seed: int) -> Solved:
    cloud, balanced = standardized(points), settings.weights == "uniform"
    candidates = [(points, None)] if count == len(points) else _solve(cloud, count, settings, seed)
    positions, weights, w2, cost = _best(cloud, candidates, balanced)
    _, nearest = linear_sum_assignment(cost)
    if settings.atoms == "medoids":
        positions, weights, w2, _ = _best(cloud, [(points[nearest], None)], balanced)
    return positions, weights, nearest, w2


def _solve(cloud: Cloud, count: int, settings: BarycenterConfig, seed: int) -> Sequence[Candidate]:
    """Return the local minima that the solver for these weights reaches from its starts."""
    points, rounds = cloud.points, settings.rounds
    drawn = draw_starts(cloud.data, count, settings.starts, seed)
    if settings.weights == "alternating":
        return [(alternating(points, points[rows], rounds), None) for rows in drawn]
    descents = (descend(cloud.data, cloud.data[rows], rounds) for rows in drawn)
    uniform = [(atoms * cloud.scale + cloud.centre, potentials) for atoms, potentials in descents]
    if settings.weights == "uniform":
        return uniform
    # Lloyd only descends: begun from the uniform solutions too, free weights are never worse than uniform ones.
    from_uniform = [positions for positions, _ in uniform]
    return [(lloyd(points, start, rounds), None) for start in [*(points[rows] for rows in drawn), *from_uniform]]


def _best(cloud: Cloud, candidates: Sequence[Candidate], balanced: bool) -> tuple[Array, Array, float, Array]:
    """Return positions [K, D], weights [K], W2² and squared distances [K, n] of the candidate with the least W2².

    All of them after rounding to float32.
    """
    measured = []
    for candidate, potentials in candidates:
        positions = candidate.astype(np.float32).astype(np.float64)
        cost = ot.dist(positions, cloud.points)
        weights = ot.unif(len(positions)) if balanced else _cell_masses(cost)
        if potentials is None:
            w2 = _transport(weights, cost)
        else:
            standard = cost / cloud.scale**2
            plan, _ = optimal(standard, potentials, ARC_REACH * standard.min(axis=0).mean())
            w2 = float(cost[plan.coords] @ plan.data)
        measured.append((positions, weights, w2, cost))
    return min(measured, key=lambda entry: entry[2])


def _cell_masses(cost: Array) -> Array:
    """Return the share of points nearest to each atom, [K]: the optimal weights for these positions, none of them zero.

    Where atoms coincide, all points would go to the first of them. An atom left empty takes the point that costs least
    from an atom that has several; between coinciding atoms this costs nothing.
    """
    cells = cost.argmin(axis=0)
    sizes = np.bincount(cells, minlength=len(cost))
    for empty in np.flatnonzero(sizes == 0):
        extra = cost[empty] - cost[cells, np.arange(len(cells))]
        taken = np.where(sizes[cells] > 1, extra, np.inf).argmin()
        sizes[cells[taken]] -= 1
        cells[taken], sizes[empty] = empty, 1
    return sizes / len(cells)


def _transport(weights: Array, cost: Array) -> float:
    return float(ot.emd2(weights, ot.unif(cost.shape[1]), cost, numItermax=MAX_PIVOTS))
