"""Means and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values and its standard error, from their sample variance.

    The error of a single value is None. There must be one at least.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, sqrt(variance / len(values))
