"""Is a difference between two runs on the same questions more than chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_FEW = 8
_CHUNK = 1_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        delta: mean of second - first.
        low, high: its 95 % percentile bootstrap interval.
        p: two-sided p-value.
        test: what ``p`` is of: ``mcnemar`` (exact) or ``bootstrap`` (paired).
    """

    delta: float
    low: float
    high: float
    p: float
    test: str


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two scores of the same documents.

    Scores of 0 and 1 are tested with McNemar's exact test, others by bootstrap.

    Args:
        first, second: one score per document, same order.

    Raises:
        ValueError: no documents, or different numbers of them.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"cannot pair {a.size} with {b.size} scores")
    gaps = b - a
    means = resampled_means(gaps, np.random.default_rng(0))
    low, high = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    if set(np.unique([a, b])) <= {0.0, 1.0}:
        p, test = mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum())), "mcnemar"
    else:
        p, test = _bootstrap_p(means), "bootstrap"
    return Difference(float(gaps.mean()), low, high, p, test)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value of ``gained`` against ``lost`` flips, equally likely by chance
    (McNemar 1947 with the binomial distribution)."""
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / (1 << flips)))


def resampled_means(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `RESAMPLES` bootstrap samples; few distinct values are drawn as their counts."""
    distinct, counts = np.unique(values, return_counts=True)
    if distinct.size <= _FEW:
        drawn = rng.multinomial(values.size, counts / values.size, size=RESAMPLES)
        return np.asarray(drawn @ distinct / values.size)
    rows = max(1, _CHUNK // values.size)
    chunks = (min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows))
    return np.concatenate(
        [values[rng.integers(values.size, size=(n, values.size))].mean(axis=1) for n in chunks]
    )


def _bootstrap_p(means: NDArray[np.float64]) -> float:
    """Twice the smaller share of resampled means on one side of zero, never below 1/N."""
    below, above = (means <= 0).mean(), (means >= 0).mean()
    return float(min(1.0, max(2 * min(below, above), 1 / len(means))))
