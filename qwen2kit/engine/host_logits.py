"""`Logits` in NumPy: the reference, and what a backend on the CPU may use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen2kit.backend.slots import BROKEN, Edit, Shortlist
from qwen2kit.generate.edit import apply_edit
from qwen2kit.generate.inverse_cdf import log_sum_exp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class HostLogits:
    """Implements `qwen2kit.backend.slots.Logits`.

    Args:
        rows: float32 ``[N, V]``; not modified.
    """

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self._rows = rows

    def greedy(self, limit: int | None) -> list[int]:
        """Argmax of every row below ``limit``, or `BROKEN`."""
        import numpy as np

        rows = self._rows[:, :limit]
        best = rows.argmax(axis=-1)
        found = np.where(np.isfinite(rows[np.arange(len(rows)), best]), best, BROKEN)
        return [int(token) for token in found]

    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        """Row by row; of equal scores the smaller id comes first."""
        import numpy as np

        count, vocab = self._rows.shape
        size = min(size, vocab)
        ids = np.empty((count, size), dtype=np.int64)
        scores = np.empty((count, size), dtype=np.float32)
        totals = np.empty((2, count), dtype=np.float64)
        for index, (row, edit) in enumerate(zip(self._rows, edits, strict=True)):
            edited = apply_edit(row, edit)
            ids[index] = _largest(edited, size)
            scores[index] = edited[ids[index]]
            totals[0, index] = log_sum_exp(edited.astype(np.float64) / (edit.temperature or 1.0))
            totals[1, index] = log_sum_exp(row[: edit.limit].astype(np.float64))
        raw = np.take_along_axis(self._rows, ids, axis=1)
        return Shortlist(ids, scores, totals[0], raw, totals[1])

    def rows(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """A copy of the named rows."""
        return self._rows[list(rows)]


def _largest(scores: NDArray[np.float32], size: int) -> NDArray[np.int64]:
    import numpy as np

    at_least = np.partition(scores, -size)[-size]
    above = np.flatnonzero(~(scores < at_least))  # of a row with NaN anything, but enough
    return above[np.argsort(-scores[above], kind="stable")][:size]
