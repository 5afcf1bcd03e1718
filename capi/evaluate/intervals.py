"""How far a score would scatter over other test sets: percentiles of the bootstrap over its items."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Num
from numpy import ndarray


def bootstrap_interval(
    counts: Num[ndarray, "items counts"],
    score: Callable[[Float[ndarray, "counts"]], float],
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """The middle `level` of `score(sum of the counts)` over test sets drawn anew from the items, with repetition.

    The draws are the same every time. How much another training set would change is not in it.
    """
    rng, n = np.random.default_rng(0), len(counts)
    scores = [
        score(np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64) @ counts) for _ in range(resamples)
    ]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
