"""The canonical draw from a whole row of logits, without sorting it.

The draw sorts a row by falling score, equal scores by rising id, keeps what top-k and top-p keep,
and walks the cumulative weights up to a point. Here the weights are added up in 65,536 buckets of
scores, and only the bucket that holds the point is sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qwen2kit.errors import NonFiniteLogits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2kit.generate.sampling import Sampling

_BUCKETS = 1 << 16


def draw_from_row(scores: NDArray[np.float32], sampling: Sampling, point: float) -> int:
    """The id in whose share of the truncated softmax ``point`` of [0, 1) falls.

    Args:
        scores: float32 ``[V]``, edited logits.
        sampling: temperature, top-k and top-p.
        point: where.

    Raises:
        NonFiniteLogits: the row holds NaN or +inf, or nothing finite.
    """
    import numpy as np

    best = scores.max()
    if not np.isfinite(best):
        raise NonFiniteLogits
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = scores + np.float32(0)  # no -0.0
    kept = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        kept = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
        scores = scores[kept]
    weights = np.exp((scores.astype(np.float64) - best) / sampling.temperature)
    row = _Row(scores, weights)
    mass = row.mass
    if sampling.top_p < 1:
        _, mass = row.find(sampling.top_p * mass, "left")
    place, _ = row.find(point * mass, "right")
    return int(kept[place])


class _Row:
    """Cumulative weights by falling score, in buckets.

    Args:
        scores: float32 ``[n]``, without NaN and -0.0.
        weights: float64 ``[n]``.

    Attributes:
        mass: sum of all weights.
    """

    def __init__(self, scores: NDArray[np.float32], weights: NDArray[np.float64]) -> None:
        import numpy as np

        bits = scores.view(np.int32)
        rising = (bits ^ ((bits >> 31) & 0x7FFF_FFFF)) >> 16  # as the scores do
        self._bucket = (_BUCKETS >> 1) - 1 - rising
        self._scores, self._weights = scores, weights
        counted = np.bincount(self._bucket, weights, _BUCKETS)
        self._sums: NDArray[np.float64] = counted.cumsum(dtype=np.float64)
        self.mass = float(self._sums[-1])

    def find(self, value: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """Place of the first entry whose cumulative weight is at least ("left") or above
        ("right") ``value``, and that weight."""
        import numpy as np

        bucket = _first(self._sums, value, side)
        members = np.flatnonzero(self._bucket == bucket)
        members = members[np.argsort(-self._scores[members], kind="stable")]
        before = self._sums[bucket - 1] if bucket else 0.0
        sums = before + np.cumsum(self._weights[members])
        place = _first(sums, value, side)
        return int(members[place]), float(sums[place])


def _first(sums: NDArray[np.float64], value: float, side: Literal["left", "right"]) -> int:
    """Index of the first sum that reaches ``value``, which rounding may put beyond them all; what
    weighs nothing is never the one."""
    import numpy as np

    return int(min(np.searchsorted(sums, value, side), np.searchsorted(sums, sums[-1])))
