"""Where the solvers of barycenters start: k-means++ in a random projection of the features."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


Single = NDArray[np.float32]


Candidate = tuple[Array, Single | None]
"""Atoms [K, D], and potentials [K] of the optimal plan if such are known."""


_SKETCH_DIMENSIONS = 64
"""k-means++ takes distances in a random projection to so many dimensions."""


def draw_starts(data: Single, count: int, number: int, seed: int) -> list[NDArray[np.int64]]:
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
        nearest[rows] = 0  # but for rounding
        reach = nearest.cumsum(dtype=np.float64)
        trials = draw.random(2 + int(np.log(count)))
        candidates = np.minimum(np.searchsorted(reach, trials * reach[-1], side="right"), len(data) - 1)
        rows.append(-1)


@dataclass(frozen=True)
class Cloud:
    """The features of a class, and the same with mean 0 and variance 1 over all directions."""

    points: Array
    """[n, D]."""
    centre: Array
    """[D]: their mean."""
    scale: float
    """Square root of their variance; 1 where that is 0."""
    data: Single
    """[n, D]: standardised."""


def standardized(points: Array) -> Cloud:
    """Return the features of a class [n, D], beside the same with mean 0 and variance 1."""
    centre = points.mean(axis=0)
    data = points - centre
    scale = float(np.sqrt(np.vdot(data, data) / len(data))) or 1.0
    single = np.empty(data.shape, np.float32)
    np.multiply(data, 1 / scale, out=single, casting="same_kind")
    return Cloud(points, centre, scale, single)
