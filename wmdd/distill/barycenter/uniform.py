"""The atoms of uniform weights: rounds of annealed plans, then of optimal plans.

Each round ends with conditional means: every atom moves to the mean of the images that its plan assigns to it.
With optimal plans alone this is POT's free_support_barycenter (Cuturi & Doucet 2014, algorithm 2).
"""

import warnings

import numpy as np
import ot
from numpy.typing import NDArray
from scipy.sparse import coo_array

Array = NDArray[np.float64]
Single = NDArray[np.float32]

_STOP_GAIN = 3e-4
"""Relative decrease of W2² in a round below which the solver stops."""
_START_TEMPERATURE = 0.12
"""First temperature of the annealing, as a share of the variance of the features."""
_END_TEMPERATURE = 0.013
"""Last temperature of the annealing, as a share of W2²."""
_ANNEALING_ROUNDS = 14
"""Rounds of the annealing."""
_MAX_MASS_ERROR = 0.1
"""Mean relative error of the atoms' masses above which annealing ends early: distant clusters freeze at once."""
_DAMPING = 0.2
"""Damping of the Newton steps."""
ARC_REACH = 0.1
"""Reduced cost, as a share of W2², below which an arc enters the first search for an optimal plan."""
_MAX_MISPLACED_MASS = 0.1
"""Share of mass on wrong atoms above which the search among few arcs is skipped: it would fail."""
_DUAL_TOLERANCE = 1e-9
"""Share of the variance within which a negative reduced cost counts as zero."""
MAX_PIVOTS = 10_000_000
"""Pivot limit of the network simplex. POT's default of 100,000 ends a large class early, with a plan not optimal."""


def descend(data: Single, positions: Single, rounds: int) -> tuple[Single, Single]:
    """Descend with weights 1/K from a start; return positions [K, D], and potentials [K] of their optimal plan.

    Optimal plans alone stay in a minimum near the start. Annealing passes over many such minima, as in Rose,
    "Deterministic annealing" (Proc. IEEE 1998). Its rounds are cheap: two float32 products and one Newton step on K
    potentials.

    The potentials of the last round save the network simplex most of its work. Here optimal plans use float32 costs:
    their last bits matter only at the end, where W2² is measured in float64 (``optimal`` with float64 costs).

    Args:
        data: standardized features [n, D].
        positions: start atoms [K, D], standardized like the features.
        rounds: limit on the rounds of each kind.
    """
    count, least, w2 = len(positions), np.inf, 1.0
    potentials = np.zeros(count, np.float32)
    for share in np.linspace(0, 1, min(rounds, _ANNEALING_ROUNDS)):
        cost = _costs(positions, data)
        temperature = np.float32(_START_TEMPERATURE ** (1 - share) * (_END_TEMPERATURE * w2) ** share)
        potentials, plan = _entropic(cost, potentials, temperature)
        w2 = max(1 + float(np.vdot(plan, cost)), 1e-6)  # 1 is the mean squared norm of standardized features
        masses = plan.sum(axis=1)
        positions = plan @ data / masses[:, None]
        astray = np.abs(count * masses - 1).mean()
        if astray > max(_MAX_MASS_ERROR, 2 * least):
            break
        least = min(least, astray)
    potentials, _ = _entropic(_costs(positions, data), potentials, temperature)

    previous = np.inf
    for _ in range(rounds):
        cost = _costs(positions, data)
        sparse, potentials = optimal(cost, potentials, ARC_REACH * w2)
        w2 = max(1 + float(cost[sparse.coords] @ sparse.data), 1e-6)
        means = (sparse.tocsr().astype(np.float32) @ data) * np.float32(count)
        # The mean cost of an atom's images falls by this amount, so its potential is lowered too.
        potentials, positions = potentials - np.square(means - positions).sum(axis=1), means
        if previous - w2 <= _STOP_GAIN * w2:
            break
        previous = w2
    return positions, potentials


def _entropic(cost: Single, potentials: Single, temperature: np.float32) -> tuple[Single, Single]:
    """Take a damped Newton step towards rows of mass 1/K; return the potentials u [K] and the entropic plan [K, n].

    The columns of a plan P always have mass 1/n; its rows have masses r. A Sinkhorn step is u − T log(K r). The Newton
    step also accounts for images shared between atoms (Brauer et al., "A Sinkhorn-Newton method for entropic optimal
    transport", 2017): the dual's second derivative is (diag(r) − n P Pᵀ) / T. Here the derivative is scaled by 1/√r on
    both sides, and the damping is added.
    """
    count, images = cost.shape
    plan = _entropic_plan(cost, potentials, temperature)
    rows = plan.sum(axis=1)
    roots = np.sqrt(rows)
    shared = plan / roots[:, None]
    matrix = np.float32(1 + _DAMPING) * np.eye(count, dtype=np.float32) - np.float32(images) * (shared @ shared.T)
    step = np.linalg.solve(matrix, roots * np.log(np.float32(count) * rows)) / roots
    potentials = potentials - temperature * np.clip(step, -10, 10)
    return potentials, _entropic_plan(cost, potentials, temperature)


def _entropic_plan(cost: Single, potentials: Single, temperature: np.float32) -> Single:
    plan = potentials[:, None] - cost
    plan -= plan.max(axis=0)
    plan /= temperature
    np.maximum(plan, -60, out=plan)  # subnormal numbers would slow the products down
    np.exp(plan, out=plan)
    plan /= plan.sum(axis=0) * np.float32(cost.shape[1])
    return plan


def optimal(cost: Array | Single, potentials: Single, reach: float) -> tuple[coo_array, Single]:
    """Return the optimal plan [K, n] for uniform masses and its potentials [K].

    With good potentials, few arcs have a reduced cost c − u − v within ``reach``, and the optimal plan uses only these.
    The network simplex therefore gets these arcs first. Its plan is optimal among all arcs if no reduced cost is
    negative under its own potentials. Otherwise the simplex gets all arcs.
    """
    count, images = cost.shape
    rows, columns = ot.unif(count), ot.unif(images)
    reduced = cost - potentials[:, None]
    nearest = reduced.argmin(axis=0)
    reduced -= reduced[nearest, np.arange(images)]
    misplaced = np.abs(np.bincount(nearest, minlength=count) / images - 1 / count).sum() / 2
    if misplaced < _MAX_MISPLACED_MASS:
        arcs = np.nonzero(reduced <= reach)
        few = coo_array((reduced[arcs].astype(np.float64), arcs), cost.shape)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # the few arcs may not suffice
            plan, log = ot.emd(rows, columns, few, log=True, numItermax=MAX_PIVOTS, center_dual=False)
        slack = (reduced - log["u"][:, None]).min(axis=0) - log["v"]
        if log["warning"] is None and slack.min() > -_DUAL_TOLERANCE:
            return coo_array(plan), potentials + log["u"].astype(np.float32)
    plan, log = ot.emd(rows, columns, cost.astype(np.float64), log=True, numItermax=MAX_PIVOTS, center_dual=False)
    return coo_array(plan), log["u"].astype(np.float32)


def _costs(positions: Single, data: Single) -> Single:
    """Return ‖b − x‖² − ‖x‖² [K, n]: the squares ‖x‖² change neither plans nor the atoms' potentials."""
    products = np.ascontiguousarray((data @ (-2 * positions).T).T)  # faster than positions @ data.T
    products += np.square(positions).sum(axis=1)[:, None]
    return products
