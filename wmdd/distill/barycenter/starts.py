"""Start positions of the barycenter solvers: k-means++ in a random projection of the features."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


Single = NDArray[np.float32]


Candidate = tuple[Array, Single | None]
"""Atoms [K, D], and potentials [K] of the optimal plan if they are known."""


_SKETCH_DIMENSIONS = 64
"""Dimensions of the random projection in which k-means++ measures distances."""


def draw_starts(data: Single, count: int, number: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows [K] of each start."""
    drawn = []
    for turn, state in enumerate(np.random.SeedSequence(seed).spawn(number)):
        draw = np.random.default_rng(state)
        rows = draw.choice(len(data), count, replace=False) if turn % 2 else _spread_out(data, count, draw)
        drawn.append(rows)
    return drawn


def _spread_out(data: Single, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Choose rows by greedy k-means++ (Arthur & Vassilvitskii 2007), as scikit-learn does.

    Distances are measured in a random projection, which nearly preserves them (Boutsidis et al., "Random projections
    for k-means clustering", 2010). Exact distances would take longer than the solver itself.
    """
    if data.shape[1] > _SKETCH_DIMENSIONS:
        data = data @ draw.standard_normal((data.shape[1], _SKETCH_DIMENSIONS), np.float32)
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
        nearest[rows] = 0  # rounding left small values
        reach = nearest.cumsum(dtype=np.float64)
        trials = draw.random(2 + int(np.log(count)))
        candidates = np.minimum(np.searchsorted(reach, trials * reach[-1], side="right"), len(data) - 1)
        rows.append(-1)


@dataclass(frozen=True)
class Cloud:
    """The features of a class, raw and standardized (mean 0, variance 1 over all directions)."""

    points: Array
    """[n, D]: the raw features."""
    centre: Array
    """[D]: mean of the raw features."""
    scale: float
    """Square root of the variance of the raw features; 1 if the variance is 0."""
    data: Single
    """[n, D]: the standardized features."""


def standardized(points: Array) -> Cloud:
    """Return the features of a class [n, D], raw and standardized."""
    centre = points.mean(axis=0)
    data = points - centre
    scale = float(np.sqrt(np.vdot(data, data) / len(data))) or 1.0
    single = np.empty(data.shape, np.float32)
    np.multiply(data, 1 / scale, out=single, casting="same_kind")
    return Cloud(points, centre, scale, single)
