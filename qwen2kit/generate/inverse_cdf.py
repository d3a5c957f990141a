"""Where a point of [0, 1) falls in a truncated softmax of which only the head is known.

The canonical draw sorts a whole row by falling score, equal scores by rising id, keeps what top-k
and top-p keep, and walks the cumulative weights up to the point. A head answers the same question
without the tail, or says that it cannot.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2kit.backend.slots import Shortlist
    from qwen2kit.generate.sampling import Sampling

_SLACK = 2e-4


@dataclass(frozen=True, slots=True)
class Head:
    """The most likely tokens of a row, by falling score, equal scores by rising id.

    Attributes:
        ids: theirs.
        cumulative: running sum of their weights, ``exp((score - best) / temperature)``.
        end: how many of them are certain, and kept by top-k; 0 if the head does not tell.
        mass: sum of the weights of all that top-k keeps.
        slack: how far ``mass`` may be off, relatively; 0 if ``end`` are all there are.
    """

    ids: list[int]
    cumulative: list[float]
    end: int
    mass: float
    slack: float


def heads_of(shortlist: Shortlist, samplings: Sequence[Sampling]) -> list[Head]:
    """The heads of all rows of a shortlist, whose equal scores may be in any order, and perhaps
    are not all of the last ones. That of a broken row means nothing."""
    import numpy as np

    scores = shortlist.scores.astype(np.float64)
    temperature = np.array([sampling.temperature or 1.0 for sampling in samplings])[:, None]
    top_k = np.array([sampling.top_k for sampling in samplings])[:, None]
    best, last = scores[:, :1], scores[:, -1:]
    with np.errstate(invalid="ignore", over="ignore"):  # broken rows
        cumulative = np.cumsum(np.exp((scores - best) / temperature), axis=1)
        mass = np.exp(shortlist.total - (best / temperature)[:, 0]).tolist()
    certain = scores > last
    known = certain.sum(axis=1).tolist()
    kth = np.take_along_axis(scores, np.clip(top_k, 1, scores.shape[1]) - 1, axis=1)
    kept = (scores >= kth).sum(axis=1).tolist()
    equal = ((scores[:, 1:] == scores[:, :-1]) & certain[:, 1:]).any(axis=1)
    ids = shortlist.ids
    for row in np.flatnonzero(equal):
        ids = ids.copy() if ids is shortlist.ids else ids
        ids[row] = ids[row, np.lexsort((ids[row], -scores[row]))]
    complete = np.isneginf(last[:, 0]).tolist()
    tokens, sums = ids.tolist(), cumulative.tolist()
    return [
        _head(sampling, tokens[i], sums[i], known[i], kept[i], complete[i], mass[i])
        for i, sampling in enumerate(samplings)
    ]


def most_likely(logits: NDArray[np.float32], count: int) -> list[int]:
    """The ``count`` ids with the largest ``logits``, of equals the smaller ones."""
    return _largest(logits, count)[0][:count].tolist() if count else []


def locate(head: Head, sampling: Sampling, point: float) -> int | None:
    """Place in ``head`` of the token that ``point`` draws; None if the tail may have a say."""
    end, mass, slack = head.end, head.mass, head.slack
    if sampling.temperature == 0 or not end:
        return 0 if end else None
    if sampling.top_p < 1:
        last = _search(bisect_left, head.cumulative, sampling.top_p * mass, slack, end)
        if last is None:
            return None
        end, mass, slack = last + 1, head.cumulative[last], 0.0
    return _search(bisect_right, head.cumulative, point * mass, slack, end)


def log_sum_exp(values: NDArray[np.float64]) -> float:
    """Natural log of the sum of exponentials, in float64; of nothing finite, no finite number."""
    import numpy as np

    peak = values.max()
    if not np.isfinite(peak):
        return float(peak)
    return float(peak + np.log(np.exp(values - peak).sum()))


def _head(
    sampling: Sampling,
    ids: list[int],
    cumulative: list[float],
    known: int,
    kept: int,
    complete: bool,
    mass: float,
) -> Head:
    """``known`` entries are certain, ``complete`` if nothing else has a weight; ``kept`` are at
    least as large as the k-th; ``mass`` is that of the whole row."""
    top_k = sampling.top_k
    if top_k > known and not complete:
        return Head(ids, cumulative, 0, 0.0, 0.0)
    if 0 < top_k < known or (top_k == known and not complete and known):
        return Head(ids, cumulative, kept, cumulative[kept - 1], 0.0)
    if complete:
        return Head(ids, cumulative, known, cumulative[known - 1], 0.0)
    return Head(ids, cumulative, known, mass, _SLACK)


def _largest(
    scores: NDArray[np.float32], size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    import numpy as np

    ids = np.arange(len(scores))
    if size < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -size)[-size])
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    return ids, scores[ids]


def _search(
    bisect: Callable[[list[float], float, int, int], int],
    cumulative: list[float],
    value: float,
    slack: float,
    end: int,
) -> int | None:
    """Place of ``value``, which is off by a factor of up to 1 ± ``slack``; None if that or what
    follows the first ``end`` may matter. Without slack nothing follows."""
    low = bisect(cumulative, value * (1 - slack), 0, end)
    if not slack:
        return min(low, end - 1)
    high = bisect(cumulative, value * (1 + slack), 0, end)
    return low if low == high < end else None
