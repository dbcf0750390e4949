"""The atoms that stand for a class: Wasserstein-2 barycenter of its features, by uniform or free weights.

The barycenter of *one* measure μ, the uniform measure on a class's features x_1..x_n, is its best approximation by K
atoms: the least W2²(Σ w_k δ_{b_k}, μ), the squared Wasserstein-2 distance for the cost ‖b − x‖². With free weights that
is optimal quantisation (k-means), with weights 1/K balanced k-means. Neither is convex: every solver descends from
several seeded starts, and the least W2² is kept.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from wmdd.config import Barycenter
from wmdd.errors import InputError, WmddError

Array = NDArray[np.float64]
Single = NDArray[np.float32]
Solved = tuple[Array, Array, NDArray[np.int64], float]

_STILL = 1e-7
"""W2² stands still once a round changes it by less than this share."""
_SETTLED = 1e-3
"""With uniform weights a start is left once a round gains less than this share; what is left is less than that."""
_TEMPERATURES = (0.2, 0.003)
"""First and last temperature of the annealing, as shares of the variance of the features."""
_ANNEALING = 10
"""Rounds of the annealing."""
_STEPS = 2
"""Sinkhorn steps of a round."""
_RELAXATION = np.float32(1.7)
"""Over-relaxation of these steps; they converge for values below 2."""
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
    with threadpool_limits(limits=1):
        return _atoms(*_checked(features.detach().numpy(), count, settings, seed))


def barycenters(
    features: Iterable[torch.Tensor], count: int, settings: Barycenter, seeds: Iterable[int], workers: int = 0
) -> Iterator[Atoms]:
    """Yield what ``barycenter`` returns for each class, in the order given, whatever the number of workers.

    Classes are read from ``features`` no further ahead than twice the number of workers.

    Args:
        features: of each class, [n, D].
        count: number K of atoms of each class.
        settings: as of ``barycenter``.
        seeds: one for each class.
        workers: processes that compute; 0 or 1 computes in this one.

    Raises:
        InputError: K is below 1, or above the n of a class.
        WmddError: a feature is not finite, or a process died.
    """
    pairs = zip(features, seeds, strict=True)
    if workers <= 1:
        for points, seed in pairs:
            yield barycenter(points, count, settings, seed)
        return
    # Forked, as DataLoader's workers are: they start at once, and touch neither torch's threads nor a GPU.
    with ProcessPoolExecutor(workers, get_context("fork"), threadpool_limits, (1,)) as pool:
        waiting: deque[Future[Solved]] = deque()
        try:
            for points, seed in pairs:
                waiting.append(pool.submit(_checked, points.detach().numpy(), count, settings, seed))
                if len(waiting) > 2 * workers:
                    yield _atoms(*waiting.popleft().result())
            while waiting:
                yield _atoms(*waiting.popleft().result())
        except BrokenProcessPool:
            raise WmddError(
                "a process that computes barycenters died; memory may be short: try fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
    data, squares, _, _ = _standardised(points)
    for turn, state in enumerate(np.random.SeedSequence(seed).generate_state(number)):
        draw = np.random.default_rng(state)
        rows = draw.choice(len(points), count, replace=False) if turn % 2 else _spread_out(data, squares, count, draw)
        drawn.append(points[rows])
    return drawn


def _spread_out(data: Single, squares: Single, count: int, draw: np.random.Generator) -> list[int]:
    """Choose rows by greedy k-means++ (Arthur & Vassilvitskii 2007), as scikit-learn does, in a third of its time.

    Its checks and float64 would take longer than all that follows.
    """
    rows = [int(draw.integers(len(data)))]
    nearest = np.full(len(data), np.inf, np.float32)
    candidates = np.array(rows)
    while True:
        distances = np.minimum(nearest, np.maximum(_squared_distances(data[candidates], data, squares), 0))
        best = distances.sum(axis=1).argmin()
        rows[-1], nearest = int(candidates[best]), distances[best]
        if len(rows) == count:
            return rows
        nearest[rows] = 0  # but for rounding
        reach = nearest.cumsum(dtype=np.float64)
        trials = draw.random(2 + int(np.log(count)))
        candidates = np.minimum(np.searchsorted(reach, trials * reach[-1], side="right"), len(data) - 1)
        rows.append(-1)


def _atoms(positions: Array, weights: Array, nearest: NDArray[np.int64], w2: float) -> Atoms:
    return Atoms(torch.from_numpy(positions).float(), torch.from_numpy(weights), torch.from_numpy(nearest).long(), w2)


def _checked(features: NDArray[np.floating], count: int, settings: Barycenter, seed: int) -> Solved:
    """Return positions, weights, nearest images and W2² of the best start, once the features are known to be fit."""
    images = len(features)
    if not 1 <= count <= images:
        raise InputError(f"ipc: {count} atoms asked of a class of {images} images; give a number from 1 to {images}")
    if not np.isfinite(features).all():
        raise WmddError("features: NaN or infinity among the class's features; is the teacher's training sound?")
    return _solved(features.astype(np.float64), count, settings, seed)


def _solved(points: Array, count: int, settings: Barycenter, seed: int) -> Solved:
    balanced = settings.weights == "uniform"
    if count == len(points):
        candidates = [points]
    else:
        drawn = starts(points, count, settings.starts, seed)
        candidates = _solve(settings.weights, points, drawn, settings.rounds)
    positions, weights, w2 = _best(points, candidates, balanced)
    _, nearest = linear_sum_assignment(ot.dist(positions, points))
    if settings.atoms == "medoids":
        positions, weights, w2 = _best(points, [points[nearest]], balanced)
    return positions, weights, nearest, w2


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
    """Descend with weights 1/K: annealed plans first, then optimal ones, each followed by conditional means.

    With optimal plans alone this is POT's free_support_barycenter (Cuturi & Doucet 2014, algorithm 2), which stays in
    a minimum near its start.  Annealing, as Rose, "Deterministic annealing" (Proc. IEEE 1998) for clustering, passes
    over many of these, in cheap rounds: one float32 product each, and entropic plans by Sinkhorn steps on K potentials.

    The potentials then spare the network simplex much of its work: of the reduced costs c − u − v most of those that
    the plan uses are near zero, and the optimal plan is the same.  Only its speed depends on them, so that float32 is
    enough.  The last rounds stop once W2² falls by less than ``_SETTLED``.
    """
    images, count = len(points), len(start)
    data, squares, centre, scale = _standardised(points)
    positions = ((start - centre) / scale).astype(np.float32)
    potentials = np.zeros(count, np.float32)
    for temperature in np.geomspace(*_TEMPERATURES, min(rounds, _ANNEALING)):
        cost = _squared_distances(positions, data, squares)
        potentials, plan = _sinkhorn(cost, potentials, temperature)
        positions = plan @ data / plan.sum(axis=1, keepdims=True)

    rows, columns = ot.unif(count), ot.unif(images)
    previous = np.inf
    for _ in range(rounds):
        cost = _squared_distances(positions, data, squares)
        potentials, _ = _sinkhorn(cost, potentials, _TEMPERATURES[1])
        reduced = cost - potentials[:, None]
        reduced -= reduced.min(axis=0)
        plan = ot.emd(rows, columns, reduced.astype(np.float64), numItermax=_PIVOTS).astype(np.float32)
        positions = plan @ data * count
        w2 = (plan * cost).sum(dtype=np.float64)
        if previous - w2 <= _SETTLED * w2:
            break
        previous = w2
    return positions * scale + centre


def _sinkhorn(cost: Single, potentials: Single, temperature: float) -> tuple[Single, Single]:
    """Take over-relaxed Sinkhorn steps towards rows of mass 1/K; return the potentials u [K] and the plan [K, n].

    The columns always have mass 1/n; over-relaxed as Thibault et al., "Overrelaxed Sinkhorn-Knopp" (Algorithms 2021).
    """
    count = len(cost)
    step = np.float32(temperature)
    for _ in range(_STEPS):
        plan = _entropic_plan(cost, potentials, step)
        potentials = potentials - _RELAXATION * step * np.log(count * plan.sum(axis=1))
    return potentials, _entropic_plan(cost, potentials, step)


def _entropic_plan(cost: Single, potentials: Single, temperature: np.float32) -> Single:
    plan = potentials[:, None] - cost
    plan -= plan.max(axis=0)
    plan /= temperature
    np.maximum(plan, -60, out=plan)  # subnormal numbers would slow the products down by a factor
    np.exp(plan, out=plan)
    plan /= plan.sum(axis=0) * np.float32(cost.shape[1])
    return plan


def _standardised(points: Array) -> tuple[Single, Single, Array, float]:
    """Return the points in float32 with mean 0 and variance 1 over all directions, their squares, centre and scale."""
    centre = points.mean(axis=0)
    data = points - centre
    scale = float(np.sqrt(np.vdot(data, data) / len(data))) or 1.0
    single = np.empty(data.shape, np.float32)
    np.multiply(data, 1 / scale, out=single, casting="same_kind")
    return single, np.einsum("nd,nd->n", single, single), centre, scale


def _squared_distances(positions: Single, data: Single, squares: Single) -> Single:
    """Return ‖b − x‖² [K, n], with ‖x‖² given."""
    return np.square(positions).sum(axis=1)[:, None] - 2 * (positions @ data.T) + squares


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
