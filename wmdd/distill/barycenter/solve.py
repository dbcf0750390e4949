"""The atoms of a class: Wasserstein-2 barycenter of its features, with uniform or free weights.

Let μ be the uniform measure on the features x_1..x_n of a class. Its barycenter is its best approximation by K atoms:
the least W2²(Σ w_k δ_{b_k}, μ), the squared Wasserstein-2 distance for the cost ‖b − x‖². With free weights this is
optimal quantization (k-means); with weights 1/K it is balanced k-means. Neither problem is convex. Every solver
descends from several seeded starts, and the result with the least W2² is kept.
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
from wmdd.distill.barycenter.tempered import tempered, tempered_masses
from wmdd.distill.barycenter.uniform import ARC_REACH, MAX_PIVOTS, descend, optimal
from wmdd.errors import InputError, WmddError

Solved = tuple[Array, Array, NDArray[np.int64], float]


@dataclass(frozen=True)
class Atoms:
    """K weighted points in feature space, and how well they represent the class."""

    positions: torch.Tensor
    """[K, D] float32: the atoms b."""
    weights: torch.Tensor
    """[K] float64: the weights w, positive, of sum 1."""
    images: torch.Tensor
    """[K] int64: distinct rows of the features, assigned to the atoms at the least total squared distance."""
    w2: float
    """Squared Wasserstein-2 distance from these positions and weights to the class, in squared feature units."""


def barycenter(features: torch.Tensor, count: int, settings: BarycenterConfig, seed: int) -> Atoms:
    """Approximate the uniform measure on ``features`` by ``count`` atoms (WMDD, step 1; Cuturi & Doucet 2014).

    Computes in float64 on one thread: sums over several threads would differ in their last bits. On one machine, the
    same input gives the same bytes.

    Args:
        features: features [n, D], on the CPU, finite.
        count: number K of atoms.
        settings: weights, kind of atoms, starts and rounds.
        seed: random seed, at least 0.

    Returns:
        The atoms. For K = n they are the features themselves.

    Raises:
        InputError: K is below 1, or above n.
        WmddError: a feature is not finite.
    """
    with _libraries().limit(limits=1):
        return atoms_of(*checked(features.detach().numpy(), count, settings, seed))


def w2_squared(features: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the exact squared Wasserstein-2 distance between weighted atoms and uniformly weighted features (ot.emd2).

    Args:
        features: features [n, D].
        positions: atoms [K, D].
        weights: weights [K], of sum 1.

    Returns:
        W2², in squared feature units.
    """
    with _libraries().limit(limits=1):
        cost = ot.dist(positions.double().numpy(), features.double().numpy())
        return _transport(weights.double().numpy(), cost)


def starts(points: Array, count: int, number: int, seed: int) -> list[Array]:
    """Draw start positions from the data, alternating k-means++ and K random points.

    k-means++ spreads the atoms out, which suits free weights. Random points follow the density, which suits uniform
    weights. A larger ``number`` keeps the starts of a smaller one.

    Args:
        points: features [n, D].
        count: number K of atoms, at most n.
        number: number of starts.
        seed: random seed, at least 0.

    Returns:
        ``number`` arrays [K, D].
    """
    return [points[rows] for rows in draw_starts(standardized(points).data, count, number, seed)]


@cache
def _libraries() -> ThreadpoolController:
    """Return the controller of the libraries' threads. The search for libraries is slow, so it is done once."""
    return ThreadpoolController()


def atoms_of(positions: Array, weights: Array, nearest: NDArray[np.int64], w2: float) -> Atoms:
    """Return the atoms of a class as tensors."""
    return Atoms(torch.from_numpy(positions).float(), torch.from_numpy(weights), torch.from_numpy(nearest).long(), w2)


def checked(features: NDArray[np.floating], count: int, settings: BarycenterConfig, seed: int) -> Solved:
    """Check the features, and return positions, weights, nearest images and W2² of the best start."""
    images = len(features)
    if not 1 <= count <= images:
        raise InputError(
            f"ipc: {count} atoms requested for a class of {images} images; use a number from 1 to {images}"
        )
    if not np.isfinite(features).all():
        raise WmddError("the features of the class contain NaN or infinity; did the teacher's training diverge?")
    return _solved(features.astype(np.float64), count, settings, seed)


def _solved(points: Array, count: int, settings: BarycenterConfig, seed: int) -> Solved:
    cloud, temper = standardized(points), _temper(settings)
    candidates = [(points, None)] if count == len(points) else _solve(cloud, count, settings, seed)
    positions, weights, w2, cost = _best(cloud, candidates, temper)
    if settings.epsilon and count < len(points):  # Sinkhorn steps are slow, so only the best start gets them
        blurred = tempered(points, positions, settings.rounds, temper, settings.epsilon * cloud.scale**2)
        positions, weights, w2, cost = _best(cloud, [(blurred, None)], temper)
    _, nearest = linear_sum_assignment(cost)
    if settings.atoms == "medoids":
        positions, weights, w2, _ = _best(cloud, [(points[nearest], None)], temper)
    return positions, weights, nearest, w2


def _temper(settings: BarycenterConfig) -> float:
    """Return the share τ of the cell masses in the weights."""
    return {"uniform": 0.0, "tempered": settings.temper}.get(settings.weights, 1.0)


def _solve(cloud: Cloud, count: int, settings: BarycenterConfig, seed: int) -> Sequence[Candidate]:
    """Return the local minimum of optimal plans reached from each start."""
    points, rounds, temper = cloud.points, settings.rounds, _temper(settings)
    drawn = draw_starts(cloud.data, count, settings.starts, seed)
    if settings.weights == "alternating":
        return [(alternating(points, points[rows], rounds), None) for rows in drawn]
    descents = (descend(cloud.data, cloud.data[rows], rounds) for rows in drawn)
    uniform = [(atoms * cloud.scale + cloud.centre, potentials) for atoms, potentials in descents]
    if temper == 0:
        return uniform
    # Lloyd never increases W2². Starting also from the uniform solutions keeps free weights at least as good.
    from_uniform = [positions for positions, _ in uniform]
    if temper == 1:
        return [(lloyd(points, start, rounds), None) for start in [*(points[rows] for rows in drawn), *from_uniform]]
    # The solutions at both ends of τ: at each end, the result is then at least as good.
    ends = [*from_uniform, *(lloyd(points, start, rounds) for start in from_uniform)]
    return [(tempered(points, start, rounds, temper), None) for start in ends]


def _best(cloud: Cloud, candidates: Sequence[Candidate], temper: float) -> tuple[Array, Array, float, Array]:
    """Return positions [K, D], weights [K], W2² and squared distances [K, n] of the candidate with the least W2².

    All are computed from the positions rounded to float32.
    """
    measured = []
    for candidate, potentials in candidates:
        positions = candidate.astype(np.float32).astype(np.float64)
        cost = ot.dist(positions, cloud.points)
        weights = tempered_masses(cost, temper)
        if potentials is None:
            w2 = _transport(weights, cost)
        else:
            standard = cost / cloud.scale**2
            plan, _ = optimal(standard, potentials, ARC_REACH * standard.min(axis=0).mean())
            w2 = float(cost[plan.coords] @ plan.data)
        measured.append((positions, weights, w2, cost))
    return min(measured, key=lambda entry: entry[2])


def _transport(weights: Array, cost: Array) -> float:
    return float(ot.emd2(weights, ot.unif(cost.shape[1]), cost, numItermax=MAX_PIVOTS))
