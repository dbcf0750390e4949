"""The atoms that stand for a class: Wasserstein-2 barycenter of its features, by uniform or free weights.

The barycenter of *one* measure μ, the uniform measure on a class's features x_1..x_n, is its best approximation by K
atoms: the least W2²(Σ w_k δ_{b_k}, μ), the squared Wasserstein-2 distance for the cost ‖b − x‖². With free weights that
is optimal quantisation (k-means), with weights 1/K balanced k-means. Neither is convex: every solver descends from
several seeded starts, and the least W2² is kept.
"""

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController, threadpool_limits

from wmdd.balanced import PIVOTS, REACH, descend, optimal
from wmdd.config import Barycenter
from wmdd.cpus import processes
from wmdd.errors import InputError, Interrupted, WmddError
from wmdd.signals import leave_to_the_run

Array = NDArray[np.float64]
Single = NDArray[np.float32]
Solved = tuple[Array, Array, NDArray[np.int64], float]
Candidate = tuple[Array, Single | None]
"""Atoms [K, D], and potentials [K] of the optimal plan if such are known."""

_STILL = 1e-7
"""W2² stands still once a round changes it by less than this share."""
_SKETCH = 64
"""k-means++ takes distances in a random projection to so many dimensions."""


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


Pending = Callable[[], Atoms]
"""Atoms that may still be computed: the call waits for them."""
Submit = Callable[[torch.Tensor, int, Barycenter, int], Pending]
"""Asks for the barycenter of these arguments, and does not wait for it."""


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
    with _libraries().limit(limits=1):
        return _atoms(*_checked(features.detach().numpy(), count, settings, seed))


def later(features: torch.Tensor, count: int, settings: Barycenter, seed: int) -> Pending:
    """Return a call that computes ``barycenter`` of these arguments, in this process."""
    return partial(barycenter, features, count, settings, seed)


@contextmanager
def solvers(workers: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Submit]:
    """Compute barycenters in other processes while this one goes on: the same bytes, whatever their number.

    The processes start with the first barycenter asked for, and end with the block or with this process.

    Args:
        workers: number of processes; 0 computes in this one, when the atoms are called for.
        stop: whether the run was asked to stop.

    Yields:
        a function of ``barycenter``'s arguments; what it returns, called, waits for the atoms and raises what
        ``barycenter`` raises.

    Raises:
        WmddError: a process died.
        Interrupted: it died of what asked the run to stop.
    """
    if not workers:
        yield later
        return

    # Forked, as DataLoader's workers are: they start at once.  Nothing but numpy is used in them, neither torch's
    # threads nor a GPU, so that they may be forked after both have been in use.
    pool = ProcessPoolExecutor(processes(workers), get_context("fork"), _begin)

    def submit(features: torch.Tensor, count: int, settings: Barycenter, seed: int) -> Pending:
        solved = pool.submit(_checked, features.detach().numpy(), count, settings, seed)
        return lambda: _atoms(*solved.result())

    try:
        yield submit
    except BrokenProcessPool:
        if stop():
            raise Interrupted("stopped while barycenters were computed") from None
        raise WmddError(
            "a process that computes barycenters died; memory may be short: try fewer compute.workers, or 0"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Make a forked process a solver: of one thread, and none that outlives the run or ends before it."""
    leave_to_the_run()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends them once one of them is dead
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the process that forked this one: killed, it cannot tell its solvers."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


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
        workers: processes that compute; 0 computes in this one.

    Raises:
        InputError: K is below 1, or above the n of a class.
        WmddError: a feature is not finite, or a process died.
    """
    with solvers(workers) as submit:
        waiting: deque[Pending] = deque()
        for points, seed in zip(features, seeds, strict=True):
            waiting.append(submit(points, count, settings, seed))
            if len(waiting) > 2 * workers:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


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
    return [points[rows] for rows in _drawn(_standardised(points).data, count, number, seed)]


def _drawn(data: Single, count: int, number: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows [K] of each start."""
    drawn = []
    for turn, state in enumerate(np.random.SeedSequence(seed).spawn(number)):
        draw = np.random.default_rng(state)
        rows = draw.choice(len(data), count, replace=False) if turn % 2 else _spread_out(data, count, draw)
        drawn.append(rows)
    return drawn


def _spread_out(data: Single, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Choose rows by greedy k-means++ (Arthur & Vassilvitskii 2007), as scikit-learn does, in a tenth of its time.

    Distances are taken in a random projection, which keeps them but for a tenth or so (Boutsidis et al., "Random
    projections for k-means clustering", 2010): in full they would take longer than all that follows.
    """
    if data.shape[1] > _SKETCH:
        data = data @ draw.standard_normal((data.shape[1], _SKETCH), np.float32)
    squares = np.einsum("nd,nd->n", data, data)
    rows = [int(draw.integers(len(data)))]
    nearest = np.full(len(data), np.inf, np.float32)
    candidates = np.array(rows)
    while True:
        distances = squares[candidates, None] - 2 * (data[candidates] @ data.T) + squares
        distances = np.minimum(nearest, np.maximum(distances, 0))
        best = distances.sum(axis=1).argmin()
        rows[-1], nearest = int(candidates[best]), distances[best]
        if len(rows) == count:
            return np.array(rows)
        nearest[rows] = 0  # but for rounding
        reach = nearest.cumsum(dtype=np.float64)
        trials = draw.random(2 + int(np.log(count)))
        candidates = np.minimum(np.searchsorted(reach, trials * reach[-1], side="right"), len(data) - 1)
        rows.append(-1)


@cache
def _libraries() -> ThreadpoolController:
    """Find the libraries that have threads once: the search takes as long as a tenth of a class."""
    return ThreadpoolController()


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


@dataclass(frozen=True)
class _Cloud:
    """The features of a class, and the same with mean 0 and variance 1 over all directions."""

    points: Array
    """[n, D]."""
    centre: Array
    """[D]: their mean."""
    scale: float
    """Square root of their variance; 1 where that is 0."""
    data: Single
    """[n, D]: standardised."""


def _standardised(points: Array) -> _Cloud:
    centre = points.mean(axis=0)
    data = points - centre
    scale = float(np.sqrt(np.vdot(data, data) / len(data))) or 1.0
    single = np.empty(data.shape, np.float32)
    np.multiply(data, 1 / scale, out=single, casting="same_kind")
    return _Cloud(points, centre, scale, single)


def _solved(points: Array, count: int, settings: Barycenter, seed: int) -> Solved:
    cloud, balanced = _standardised(points), settings.weights == "uniform"
    candidates = [(points, None)] if count == len(points) else _solve(cloud, count, settings, seed)
    positions, weights, w2, cost = _best(cloud, candidates, balanced)
    _, nearest = linear_sum_assignment(cost)
    if settings.atoms == "medoids":
        positions, weights, w2, _ = _best(cloud, [(points[nearest], None)], balanced)
    return positions, weights, nearest, w2


def _solve(cloud: _Cloud, count: int, settings: Barycenter, seed: int) -> Sequence[Candidate]:
    """Return the local minima that the solver for these weights reaches from its starts."""
    points, rounds = cloud.points, settings.rounds
    drawn = _drawn(cloud.data, count, settings.starts, seed)
    if settings.weights == "alternating":
        return [(_alternating(points, points[rows], rounds), None) for rows in drawn]
    descents = (descend(cloud.data, cloud.data[rows], rounds) for rows in drawn)
    uniform = [(atoms * cloud.scale + cloud.centre, potentials) for atoms, potentials in descents]
    if settings.weights == "uniform":
        return uniform
    # Lloyd only descends: begun from the uniform solutions too, free weights are never worse than uniform ones.
    from_uniform = [positions for positions, _ in uniform]
    return [(_lloyd(points, start, rounds), None) for start in [*(points[rows] for rows in drawn), *from_uniform]]


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
        plan, log = ot.emd(weights, mass, cost, log=True, numItermax=PIVOTS)
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


def _best(cloud: _Cloud, candidates: Sequence[Candidate], balanced: bool) -> tuple[Array, Array, float, Array]:
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
            plan, _ = optimal(standard, potentials, REACH * standard.min(axis=0).mean())
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
    return float(ot.emd2(weights, ot.unif(cost.shape[1]), cost, numItermax=PIVOTS))
