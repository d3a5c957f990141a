"""Where a point of [0, 1) falls in a truncated softmax of which only the head is known.

The canonical draw sorts a whole row by falling score, equal scores by rising id, keeps what top-k
and top-p keep, and walks the cumulative weights up to the point. A head answers the same question
without the tail, or says that it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qwen2kit.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2kit.generate.sampling import Sampling

_HOST_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Head:
    """The most likely tokens of a row, by falling score, equal scores by rising id.

    Attributes:
        ids: int64 ``[n]``.
        scores: float32 ``[n]``, edited logits.
        total: log-sum-exp of ``scores / temperature`` over the whole row.
        slack: how far ``total`` may be off.
        complete: whether no other token has a finite score.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    total: float
    slack: float
    complete: bool

    @classmethod
    def sorted(
        cls, ids: NDArray[np.int64], scores: NDArray[np.float32], total: float, slack: float
    ) -> Head:
        """From the largest entries of a row by falling score; equal scores in any order, and
        perhaps not all of the last ones."""
        import numpy as np

        last = scores[-1]
        complete = bool(last == -np.inf)
        known = int(np.searchsorted(-scores, -last))
        ids, scores = ids[:known], scores[:known]
        if (scores[1:] == scores[:-1]).any():
            order = np.lexsort((ids, -scores))
            ids, scores = ids[order], scores[order]
        return cls(ids, scores, total, slack, complete)


def head_of_row(scores: NDArray[np.float32], size: int, temperature: float) -> Head:
    """The head of a whole row: at least ``size`` tokens (all that equal the last one, too).

    Raises:
        BackendError: the row holds NaN, or nothing finite.
    """
    import numpy as np

    check_finite(scores[scores.argmax()])
    ids = np.arange(len(scores))
    if size < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -size)[-size]) if size else ids[:0]
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    total = log_sum_exp(scores.astype(np.float64) / (temperature or 1.0))
    return Head(ids, scores[ids], total, _HOST_SLACK, len(ids) == len(scores))


def locate(head: Head, sampling: Sampling, point: float) -> int | None:
    """Place in ``head`` of the token that ``point`` draws; None if the tail may have a say."""
    import numpy as np

    size = len(head.ids)
    if sampling.temperature == 0 or not size:
        return 0 if size else None
    truncated = sampling.top_k > 0 and not (head.complete and sampling.top_k >= size)
    if truncated and sampling.top_k > size:
        return None
    scores = head.scores.astype(np.float64)
    cumulative = np.cumsum(np.exp((scores - scores[0]) / sampling.temperature))
    if truncated:
        kept = int(np.searchsorted(-scores, -scores[sampling.top_k - 1], side="right"))
        cumulative = cumulative[:kept]
    slack = 0.0 if truncated or head.complete else head.slack
    mass = float(cumulative[-1])
    if slack:
        mass = float(np.exp(head.total - scores[0] / sampling.temperature))
    if sampling.top_p < 1:
        last = _search(cumulative, sampling.top_p * mass, slack, "left")
        if last is None:
            return None
        cumulative, slack = cumulative[: last + 1], 0.0
        mass = float(cumulative[-1])
    return _search(cumulative, point * mass, slack, "right")


def check_finite(best: NDArray[np.float32] | np.float32) -> None:
    """Refuse rows whose largest logits are ``best``: NaN, or nothing finite to choose from.

    Raises:
        BackendError: one of them is not finite.
    """
    import numpy as np

    if not np.isfinite(best).all():
        raise BackendError(
            "the model produced NaN or infinite logits; use dtype bfloat16 or float32"
        )


def log_sum_exp(values: NDArray[np.float64]) -> float:
    """Natural log of the sum of exponentials, in float64."""
    import numpy as np

    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum()))


def _search(
    cumulative: NDArray[np.float64], value: float, slack: float, side: Literal["left", "right"]
) -> int | None:
    """Place of ``value``, which is off by a factor of up to 1 ± ``slack``; None if that or what
    follows ``cumulative`` may matter. Without slack nothing follows."""
    low = int(cumulative.searchsorted(value * (1 - slack), side))
    if not slack:
        return min(low, len(cumulative) - 1)
    high = int(cumulative.searchsorted(value * (1 + slack), side))
    return low if low == high < len(cumulative) else None
