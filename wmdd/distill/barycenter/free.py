"""Barycenters with free weights: Lloyd's algorithm, and the paper's alternation."""

import warnings

import numpy as np
import ot
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from wmdd.distill.barycenter.starts import Array
from wmdd.distill.barycenter.uniform import MAX_PIVOTS

MIN_GAIN = 1e-7
"""Relative change of W2² in a round below which the solver stops."""


def lloyd(points: Array, start: Array, rounds: int) -> Array:
    """Return the atoms of free weights: nearest atom, then cell means (Lloyd 1982; scikit-learn's KMeans)."""
    solver = KMeans(len(start), init=start, n_init=1, max_iter=rounds, tol=0)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # fewer distinct points than atoms
        return solver.fit(points).cluster_centers_


def alternating(points: Array, start: Array, rounds: int) -> Array:
    """Return the atoms of the paper's algorithm: dual subgradient step on the weights, Newton step on the positions.

    Cuturi & Doucet 2014, algorithms 1 and 2, for one measure. W2² is convex in the weights, and the dual potential u of
    the optimal plan T is a subgradient. The weights take the mirror step w_k ∝ w_k exp(−η u_k), which stays on the
    simplex. The step length is Polyak's, η = (W2² − W2²*) / ‖u‖∞². For one measure the least W2²* over all weights is
    known: the mean squared distance to the nearest atom. The step shrinks as weights improve, and needs no tuning.
    The positions take the full Newton step b_k = Σ_i t_ki x_i / w_k. Both steps of a round use the same plan.
    """
    images, count = len(points), len(start)
    mass, weights, positions = ot.unif(images), ot.unif(count), start
    previous = np.inf
    for _ in range(rounds):
        cost = ot.dist(positions, points)
        plan, log = ot.emd(weights, mass, cost, log=True, numItermax=MAX_PIVOTS)
        w2 = log["cost"]
        if abs(previous - w2) <= MIN_GAIN * w2:
            break
        previous = w2
        positions = plan @ points / weights[:, None]

        potential = log["u"] - (log["u"].max() + log["u"].min()) / 2  # a constant added to u changes no weight
        steepest = np.abs(potential).max()
        if steepest > 0:
            excess = max(w2 - cost.min(axis=0).mean(), 0.0)
            weights = weights * np.exp(-excess / steepest**2 * potential)
            # A light atom sits on a real image, so weights rarely fall below 1/n. The floor keeps the division safe.
            weights = np.maximum(weights / weights.sum(), 0.01 / images)
            weights /= weights.sum()
    return positions
