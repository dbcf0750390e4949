"""Barycenters with tempered weights and entropic plans: every solver between uniform and free weights.

The masses of the atoms b_1..b_K are m_k = (1 − τ)/K + τ·c_k, where c_k is the share of images nearest to b_k. The plan
T is the optimal one between these masses and the class, or the entropic one: the least ⟨T, C⟩ + ε·KL(T | m ⊗ μ). Each
round ends with conditional means, b_k = Σ_i t_ki x_i / m_k. τ = 0 is the fixed-mass barycenter of Cuturi & Doucet
(2014, algorithm 2), and with ε = 0, τ = 1 is Lloyd's algorithm. For fixed atoms W2² is convex in τ and least at τ = 1.
"""

import numpy as np
import ot

from wmdd.distill.barycenter.starts import Array
from wmdd.distill.barycenter.uniform import MAX_PIVOTS

_STOP_GAIN = 1e-4
"""Relative decrease of the objective in a round below which a round counts as idle."""
_IDLE_ROUNDS = 2
"""Idle rounds in a row after which the solver stops. Between τ = 0 and 1 a round may increase the objective."""
_SINKHORN_STEPS = 1000
"""Limit on the Sinkhorn steps of one plan."""
_MARGINAL_TOLERANCE = 1e-6
"""Error of the marginals at which the Sinkhorn steps end."""


def tempered_masses(cost: Array, temper: float) -> Array:
    """Return the masses of the atoms [K] for squared distances [K, n]: (1 − τ)/K + τ·(cell masses), all positive."""
    even = ot.unif(len(cost))
    return even if temper == 0 else (1 - temper) * even + temper * cell_masses(cost)


def cell_masses(cost: Array) -> Array:
    """Return the share of points nearest to each atom, [K]: the optimal weights for these positions, all positive.

    Of several identical atoms, the first would get all points. An atom without points takes one from an atom that has
    several: the one that adds least cost. Between identical atoms the added cost is zero.
    """
    cells = cost.argmin(axis=0)
    sizes = np.bincount(cells, minlength=len(cost))
    for empty in np.flatnonzero(sizes == 0):
        extra = cost[empty] - cost[cells, np.arange(len(cells))]
        taken = np.where(sizes[cells] > 1, extra, np.inf).argmin()
        sizes[cells[taken]] -= 1
        cells[taken], sizes[empty] = empty, 1
    masses: Array = sizes / len(cells)
    return masses


def tempered(points: Array, start: Array, rounds: int, temper: float, epsilon: float = 0) -> Array:
    """Return the atoms [K, D] of tempered weights: the positions with the least objective of all rounds.

    Args:
        points: features [n, D].
        start: start atoms [K, D].
        rounds: limit on the rounds.
        temper: τ, from 0 to 1.
        epsilon: weight ε of the entropy, in squared feature units; 0 for optimal plans.
    """
    mass = ot.unif(len(points))
    positions, best, least, idle = start, start, np.inf, 0
    for _ in range(rounds):
        cost = ot.dist(positions, points)
        masses = tempered_masses(cost, temper)
        plan, log = ot.emd(masses, mass, cost, log=True, numItermax=MAX_PIVOTS)
        value = log["cost"]
        if epsilon:
            plan = entropic_plan(masses, mass, cost, epsilon, (log["u"], log["v"]))
            value = float(np.vdot(plan, cost)) + epsilon * _divergence(plan, masses, mass)
        idle = idle + 1 if value >= least * (1 - _STOP_GAIN) else 0
        if value < least:
            best, least = positions, value
        if idle == _IDLE_ROUNDS or least <= 0:
            break
        positions = plan @ points / plan.sum(axis=1, keepdims=True)
    return best


def entropic_plan(rows: Array, columns: Array, cost: Array, epsilon: float, potentials: tuple[Array, Array]) -> Array:
    """Return the entropic plan [K, n] between two measures: the least ⟨T, C⟩ + ε·KL(T | rows ⊗ columns) (Cuturi 2013).

    Small ε underflow in plain Sinkhorn steps. The potentials of the optimal plan are therefore taken out of the costs
    first, and large scalings are absorbed (Schmitzer, "Stabilized sparse scaling algorithms", 2019; POT).

    Args:
        rows: masses [K].
        columns: masses [n].
        cost: costs [K, n].
        epsilon: weight of the entropy, in units of the costs.
        potentials: potentials [K] and [n] of the optimal plan.
    """
    plan: Array = ot.bregman.sinkhorn_stabilized(
        rows,
        columns,
        cost,
        epsilon,
        numItermax=_SINKHORN_STEPS,
        stopThr=_MARGINAL_TOLERANCE,
        warmstart=potentials,
        print_period=10,
        warn=False,
    )
    return plan


def _divergence(plan: Array, rows: Array, columns: Array) -> float:
    """Return KL(T | rows ⊗ columns)."""
    used = plan > 0
    product = rows[:, None] * columns
    return float((plan[used] * np.log(plan[used] / product[used])).sum())
