"""How far two logit arrays are apart: the numbers every parity claim of this project rests on.

Everything is computed in slices of rows, so two memory-mapped arrays of a long prompt and a large
vocabulary are compared without a copy of either in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING

from qwen2kit.errors import ParityError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLICE_ELEMENTS = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitDelta:
    """Difference between two sets of logits for the same tokens.

    Attributes:
        max_abs: largest absolute difference; infinite if either side holds a NaN or infinity
            where the other does not agree exactly.
        median_abs: median absolute difference over all positions and ids (the lower one of an
            even count).
        kl: KL(first || second) in nats, mean over positions, in float64.
        top1_agreement: fraction of positions whose most likely id is the same.
        positions: how many positions were compared.
    """

    max_abs: float
    median_abs: float
    kl: float
    top1_agreement: float
    positions: int

    def within(self, tolerance: float) -> bool:
        """Whether no logit differs by more than ``tolerance``; never true of NaN or infinity."""
        return isfinite(self.max_abs) and self.max_abs <= tolerance

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields as JSON values; an infinite difference becomes None."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value if isfinite(value) else None for name, value in values.items()}


def compare_logits(a: NDArray[np.float32], b: NDArray[np.float32]) -> LogitDelta:
    """Compare logits ``[T, V]`` of two implementations.

    The vocabularies may have padding tails of different length; the common part is compared.

    Raises:
        ParityError: the arrays are not matrices with the same, positive number of rows.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or not a.size or not b.size:
        raise ParityError(
            f"logits of shapes {list(a.shape)} and {list(b.shape)} cannot be compared; "
            "both must be [tokens, vocabulary] of the same tokens"
        )
    max_abs, kl_sum, same = 0.0, 0.0, 0
    high = _Histogram()
    for left, right in _slices(a, b):
        diff = _difference(left, right)
        max_abs = max(max_abs, float(diff.max()))
        high.add(_bits(diff) >> 16)
        kl_sum += _kl_sum(left, right)
        same += int((left.argmax(axis=-1) == right.argmax(axis=-1)).sum())
    return LogitDelta(
        max_abs=max_abs,
        median_abs=_median(a, b, high),
        kl=kl_sum / len(a),
        top1_agreement=same / len(a),
        positions=len(a),
    )


def merge_deltas(deltas: list[LogitDelta]) -> LogitDelta:
    """One delta for several prompts: the worst difference, the largest median, and the mean over
    all positions of KL and agreement."""
    if not deltas:
        raise ParityError("there are no logits to compare")
    positions = sum(delta.positions for delta in deltas)
    return LogitDelta(
        max_abs=max(delta.max_abs for delta in deltas),
        median_abs=max(delta.median_abs for delta in deltas),
        kl=sum(delta.kl * delta.positions for delta in deltas) / positions,
        top1_agreement=sum(d.top1_agreement * d.positions for d in deltas) / positions,
        positions=positions,
    )


def negative_log_likelihood(logits: NDArray[np.float32], tokens: Sequence[int]) -> float:
    """Sum over a text of ``-ln p(token | tokens before it)`` in nats, in float64.

    The first token has nothing before it and is not counted.

    Args:
        logits: ``[T, V]``; row ``i`` predicts token ``i + 1``.
        tokens: ``T`` ids.

    Raises:
        ParityError: there are not as many rows as tokens.
    """
    import numpy as np

    if logits.ndim != 2 or len(logits) != len(tokens):
        raise ParityError(f"logits of shape {list(logits.shape)} for {len(tokens)} tokens")
    total, start = 0.0, 0
    for rows, _ in _slices(logits[:-1], logits[:-1]):
        targets = np.asarray(tokens[start + 1 : start + 1 + len(rows)])
        total -= float(_log_softmax(rows)[np.arange(len(rows)), targets].sum())
        start += len(rows)
    return total


class _Histogram:
    """Counts of 16-bit keys."""

    def __init__(self) -> None:
        import numpy as np

        self.counts = np.zeros(1 << 16, dtype=np.int64)

    def add(self, keys: NDArray[np.integer]) -> None:
        import numpy as np

        self.counts += np.bincount(keys.reshape(-1), minlength=1 << 16)

    def find(self, rank: int) -> tuple[int, int]:
        """The key at ``rank`` (0-based, ascending) and the rank within that key."""
        import numpy as np

        totals = np.cumsum(self.counts)
        key = int(np.searchsorted(totals, rank, side="right"))
        return key, rank - (int(totals[key - 1]) if key else 0)


def _median(a: NDArray[np.float32], b: NDArray[np.float32], high: _Histogram) -> float:
    """Exact median in two passes: bit patterns of non-negative floats sort like the floats."""
    import numpy as np

    key, rank = high.find((int(high.counts.sum()) - 1) // 2)
    low = _Histogram()
    for left, right in _slices(a, b):
        bits = _bits(_difference(left, right))
        low.add(bits[bits >> 16 == key] & 0xFFFF)
    bits_of_median = np.uint32((key << 16) | low.find(rank)[0])
    return float(bits_of_median.view(np.float32))


def _slices(
    a: NDArray[np.float32], b: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    width = min(a.shape[1], b.shape[1])
    rows = max(1, _SLICE_ELEMENTS // width)
    for start in range(0, len(a), rows):
        yield a[start : start + rows, :width], b[start : start + rows, :width]


def _difference(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    with np.errstate(invalid="ignore"):
        diff = np.abs(left - right)
    diff[left == right] = 0.0
    diff[np.isnan(diff)] = inf
    return np.asarray(diff)


def _bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    import numpy as np

    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


def _kl_sum(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    import numpy as np

    p, q = _log_softmax(left), _log_softmax(right)
    with np.errstate(invalid="ignore"):
        total = float((np.exp(p) * (p - q)).sum())
    return inf if np.isnan(total) else max(total, 0.0)


def _log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    with np.errstate(invalid="ignore"):
        shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
