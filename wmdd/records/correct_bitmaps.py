"""Which test images a student got right: a compact record of them, and what it tells."""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wmdd.records.intervals import Difference, welch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS = 1000
"""Bootstrap draws of an error."""
MOST_WEIGHTS = 2_000_000
"""Weights of test images held at once, 16 MB."""


def pack(correct: Sequence[bool]) -> str:
    """Return a bit for each test image, eight to a byte, as base64."""
    import numpy as np

    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode()


def unpack(text: str, count: int) -> "NDArray[np.bool_]":
    """Return the bits of ``pack``: bool [count].

    Raises:
        ValueError: the text is not base64, or it has another number of images.
    """
    import numpy as np

    content = base64.b64decode(text, validate=True)
    if len(content) != -(-count // 8):
        raise ValueError(f"{len(content)} bytes are not one bit for each of {count} test images")
    return np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=count).astype(bool)


def by_class(correct: "NDArray[np.bool_] | NDArray[np.floating]", counts: Sequence[int]) -> list[float]:
    """Return the accuracy of each class.

    Args:
        correct: [N] bool or a share of several students, the images of a class together, in the order of the classes.
        counts: number of test images of each class.
    """
    import numpy as np

    parts = np.split(np.asarray(correct, dtype=float), np.cumsum(counts)[:-1])
    return [float(part.mean()) if len(part) else float("nan") for part in parts]


def mcnemar(one: "NDArray[np.bool_]", other: "NDArray[np.bool_]") -> tuple[int, int, float]:
    """Compare two students on the same test images.

    Returns:
        the number of images that only the first got right, that of the second, and the exact two-sided p-value of both
        being as good on other images (binomial, p = ½). It is about these two students, not about their methods.
    """
    import numpy as np
    from scipy.special import bdtr

    first, second = int(np.sum(one & ~other)), int(np.sum(other & ~one))
    # At p = ½ both tails are alike.
    return first, second, min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))


def two_way(
    one: "Sequence[NDArray[np.floating]]", other: "Sequence[NDArray[np.floating]]", draws: int = DRAWS
) -> Difference:
    """Return the difference of two methods with its error over other sets and other test images.

    The error is that of a bootstrap over both: the sets of each method and the test images, which both methods share,
    are drawn with replacement (A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007), 386–411).
    Deviations of the sets are stretched by √(n/(n − 1)), for drawn sets vary less than the population does. The degrees
    of freedom are ``welch``'s. The draws are seeded.

    Args:
        one: for each set of the first method, the share of its students that got each test image right: [N].
        other: the same of the second method, on the same images.
        draws: bootstrap draws.
    """
    import numpy as np

    random = np.random.default_rng(0)
    sides = [np.asarray(side, dtype=float) for side in (one, other)]
    over_sets = welch(*(side.mean(1).tolist() for side in sides))
    images = sides[0].shape[1]
    stretched = []
    for side in sides:
        n, mean = len(side), side.mean(0)
        stretched.append(mean + (side - mean) * np.sqrt(n / (n - 1)) if n > 1 else side)
    found = np.empty(draws)
    at_once = max(1, MOST_WEIGHTS // images)
    for start in range(0, draws, at_once):
        part = slice(start, min(start + at_once, draws))
        count = part.stop - start
        shown = random.multinomial(images, np.full(images, 1 / images), size=count)
        means = []
        for side in stretched:
            drawn = random.multinomial(len(side), np.full(len(side), 1 / len(side)), size=count)
            # Means of each set on the images that were drawn, then of the sets that were.
            means.append((shown @ side.T * drawn).sum(1) / (len(side) * images))
        found[part] = means[0] - means[1]
    return Difference(over_sets.mean, float(found.std(ddof=1)), over_sets.freedom)
