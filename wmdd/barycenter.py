"""The atoms that stand for a class: Wasserstein-2 barycenter of its features, by uniform or free weights.

The barycenter of *one* measure μ, the uniform measure on a class's features x_1..x_n, is its best approximation by K
atoms: the least W2²(Σ w_k δ_{b_k}, μ), the squared Wasserstein-2 distance for the cost ‖b − x‖². With free weights that
is optimal quantisation (k-means), with weights 1/K balanced k-means. Neither is convex: every solver descends from
several seeded starts, and the least W2² is kept.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from wmdd.config import Barycenter
from wmdd.errors import InputError, WmddError

Array = NDArray[np.float64]
Solver = Callable[[Array, Array, int], Array]

_STILL = 1e-7
"""W2² stands still once a round changes it by less than this share."""
_PIVOTS = 10_000_000
"""Most pivots of the network simplex: POT's 100,000 would end a large class early, with a plan that is not optimal."""


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


def barycenter(features: torch.Tensor, count: int, settings: Barycenter, seed: int) -> Atoms:
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
    images = len(features)
    if not 1 <= count <= images:
        raise InputError(f"ipc: {count} atoms asked of a class of {images} images; give a number from 1 to {images}")
    if not torch.isfinite(features).all():
        raise WmddError("features: NaN or infinity among the class's features; is the teacher's training sound?")
    points = features.detach().double().numpy()
    balanced = settings.weights == "uniform"

    with threadpool_limits(limits=1):
        if count == images:
            candidates = [points]
        else:
            drawn = starts(points, count, settings.starts, seed)
            candidates = _solve(settings.weights, points, drawn, settings.rounds)
        positions, weights, w2 = _best(points, candidates, balanced)
        _, nearest = linear_sum_assignment(ot.dist(positions, points))
        if settings.atoms == "medoids":
            positions, weights, w2 = _best(points, [points[nearest]], balanced)

    return Atoms(
        positions=torch.from_numpy(positions).float(),
        weights=torch.from_numpy(weights),
        images=torch.from_numpy(nearest).long(),
        w2=w2,
    )


def w2_squared(features: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the exact squared Wasserstein-2 distance between weighted atoms and uniformly weighted features (ot.emd2).

    Args:
        features: [n, D].
        positions: [K, D].
        weights: [K], of sum 1.

    Returns:
        W2², in squared feature units.
    """
    with threadpool_limits(limits=1):
        return _w2_squared(features.double().numpy(), positions.double().numpy(), weights.double().numpy())


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
    drawn = []
    for turn, state in enumerate(np.random.SeedSequence(seed).generate_state(number)):
        if turn % 2 == 0:
            drawn.append(kmeans_plusplus(points, count, random_state=int(state))[0])
        else:
            drawn.append(points[np.random.default_rng(state).choice(len(points), count, replace=False)])
    return drawn


def _solve(weights: str, points: Array, drawn: list[Array], rounds: int) -> list[Array]:
    """Return the local minima [K, D] that the solver for these weights reaches from the starts ``drawn``."""
    if weights == "alternating":
        return [_alternating(points, start, rounds) for start in drawn]
    uniform = [_uniform(points, start, rounds) for start in drawn]
    if weights == "uniform":
        return uniform
    # Lloyd only descends: begun from the uniform solutions too, free weights are never worse than uniform ones.
    return [_lloyd(points, start, rounds) for start in [*drawn, *uniform]]


def _uniform(points: Array, start: Array, rounds: int) -> Array:
    """Descend with weights 1/K: optimal plan, then conditional means (POT's free_support_barycenter).

    It reaches a fixed point in few rounds, because it moves between the finitely many vertices of the plans' polytope.
    POT stops on the squared displacement, an absolute number: the threshold is therefore a share of the variance.
    """
    still = 1e-12 * points.var(axis=0).sum()
    mass = ot.unif(len(points))
    return ot.lp.free_support_barycenter([points], [mass], start, numItermax=rounds, stopThr=still)


def _lloyd(points: Array, start: Array, rounds: int) -> Array:
    """Descend with free weights: nearest atom, then cell means (Lloyd 1982; scikit-learn's KMeans)."""
    solver = KMeans(len(start), init=start, n_init=1, max_iter=rounds, tol=0)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # fewer distinct points than atoms
        return solver.fit(points).cluster_centers_


def _alternating(points: Array, start: Array, rounds: int) -> Array:
    """Descend by the paper's algorithm: dual subgradient step on the weights, Newton step on the positions.

    Cuturi & Doucet 2014, algorithms 1 and 2, for one measure. W2² is convex in the weights and the dual potential u of
    the optimal plan T is a subgradient; the weights take the mirror step w_k ∝ w_k exp(−η u_k), which stays on the
    simplex. Its length is Polyak's, η = (W2² − W2²*) / ‖u‖∞²: for one measure the least W2²* over all weights is known,
    the mean squared distance to the nearest atom. It shrinks as the weights improve and needs no tuning. The positions
    take the full Newton step b_k = Σ_i t_ki x_i / w_k. One plan serves both steps of a round.
    """
    images, count = len(points), len(start)
    mass, weights, positions = ot.unif(images), ot.unif(count), start
    previous = np.inf
    for _ in range(rounds):
        cost = ot.dist(positions, points)
        plan, log = ot.emd(weights, mass, cost, log=True, numItermax=_PIVOTS)
        w2 = log["cost"]
        if abs(previous - w2) <= _STILL * w2:
            break
        previous = w2
        positions = plan @ points / weights[:, None]

        potential = log["u"] - (log["u"].max() + log["u"].min()) / 2  # a constant does not move weights of sum 1
        steepest = np.abs(potential).max()
        if steepest > 0:
            excess = max(w2 - cost.min(axis=0).mean(), 0.0)
            weights = weights * np.exp(-excess / steepest**2 * potential)
            # Weights seldom fall below 1/n, as a light atom sits on a real image; the floor keeps the division safe.
            weights = np.maximum(weights / weights.sum(), 0.01 / images)
            weights /= weights.sum()
    return positions


def _best(points: Array, candidates: list[Array], balanced: bool) -> tuple[Array, Array, float]:
    """Return positions [K, D], weights [K] and W2² of the candidate with the least W2², after rounding to float32."""
    measured = []
    for candidate in candidates:
        positions = candidate.astype(np.float32).astype(np.float64)
        weights = ot.unif(len(positions)) if balanced else _cell_masses(points, positions)
        measured.append((positions, weights, _w2_squared(points, positions, weights)))
    return min(measured, key=lambda entry: entry[2])


def _cell_masses(points: Array, positions: Array) -> Array:
    """Return the share of points nearest to each atom, [K]: the optimal weights for these positions, none of them zero.

    Where atoms coincide, all points would go to the first of them. An atom left empty takes the point that costs least
    from an atom that has several; between coinciding atoms this costs nothing.
    """
    cost = ot.dist(positions, points)
    cells = cost.argmin(axis=0)
    sizes = np.bincount(cells, minlength=len(positions))
    for empty in np.flatnonzero(sizes == 0):
        extra = cost[empty] - cost[cells, np.arange(len(points))]
        taken = np.where(sizes[cells] > 1, extra, np.inf).argmin()
        sizes[cells[taken]] -= 1
        cells[taken], sizes[empty] = empty, 1
    return sizes / len(points)


def _w2_squared(points: Array, positions: Array, weights: Array) -> float:
    return float(ot.emd2(weights, ot.unif(len(points)), ot.dist(positions, points), numItermax=_PIVOTS))
