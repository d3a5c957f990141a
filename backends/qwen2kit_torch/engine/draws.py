"""Draws for N rows by `kernels.draws`: buffers and launches.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from qwen2kit.backend.slots import Cut, Edit
from qwen2kit_torch.engine.kernels import draws
from qwen2kit_torch.engine.sending import sent

_PROGRAMS = 1056
_BLOCK = 2048
_SCAN, _SCAN_PENALISED = 4096, 2048  # as registers allow
_FOUND = 1024
_WARPS = 8


class Scratch:
    """Memory that draws for N rows work in.

    Attributes:
        keys, ids: int32 ``[N, V]``.
        said: int16 ``[N, V]``, see `kernels.draws.scores_of`; empty unless asked for.
    """

    def __init__(self, count: int, vocab: int, device: torch.device, *, said: bool = False) -> None:
        self.keys, self.ids = torch.empty(2, count, vocab, dtype=torch.int32, device=device)
        self.said = torch.empty(count if said else 0, vocab, dtype=torch.int16, device=device)


class Draws:
    """Buffers and launches of one draw for each of N rows.

    Args:
        count: N.
        vocab: V.
        device: where.
        scratch: for N rows at least; its own if None.
        steps: draws that `points` are set for at a time.

    Attributes:
        drawn: int32 ``[N]``, the ids, `BROKEN` where there is none.
        points: float64 ``[N, steps]``, where the draws cut.
        step: int32 ``[1]``, number of the draw, from 1 on.
    """

    def __init__(
        self,
        count: int,
        vocab: int,
        device: torch.device,
        *,
        scratch: Scratch | None = None,
        steps: int = 1,
    ) -> None:
        self._count, self._vocab, self._steps = count, vocab, steps
        most = min(draws.MOST_PARTS, triton.cdiv(vocab, _BLOCK), _PROGRAMS // count)
        self._width = triton.cdiv(triton.cdiv(vocab, max(1, most)), _BLOCK) * _BLOCK
        self._parts = triton.cdiv(vocab, self._width)

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.drawn = empty(torch.int32, count)
        self.points = empty(torch.float64, count, steps)
        self.step = torch.ones(1, dtype=torch.int32, device=device)
        self._limits, self._top_k = (empty(torch.int32, count) for _ in range(2))
        self._temperatures, self._top_p = (empty(torch.float64, count) for _ in range(2))
        self._peaks = empty(torch.float32, count, self._parts)
        self._weights = empty(torch.float64, count, draws.BUCKETS)
        self._counts = empty(torch.int32, count, draws.BUCKETS)
        self._scratch = scratch or Scratch(count, vocab, device)

    def set(self, edits: Sequence[Edit], cuts: Sequence[Cut]) -> None:
        """Limits, temperatures (0 takes the most likely), cuts and first points of the first
        rows; the others draw from all that their logits give."""
        cold = [edit.temperature == 0 for edit in edits]
        pairs = list(zip(cold, cuts, strict=True))
        vocab = self._vocab
        columns = np.zeros((5, self._count))
        columns[:4, len(edits) :] = np.array([[vocab], [0], [1], [1]])
        columns[:, : len(edits)] = np.array(
            [
                [vocab if edit.limit is None else edit.limit for edit in edits],
                [0 if still else cut.top_k for still, cut in pairs],
                [edit.temperature or 1.0 for edit in edits],
                [1.0 if still else cut.top_p for still, cut in pairs],
                [0.0 if still else cut.point for still, cut in pairs],
            ]
        )
        places = (self._limits, self._top_k, self._temperatures, self._top_p, self.points[:, 0])
        for place, column in zip(places, sent(columns, self.drawn.device), strict=True):
            place.copy_(column)

    def run(
        self,
        logits: Tensor,
        *,
        counts: bool,
        said: Tensor | None = None,
        penalties: Tensor | None = None,
    ) -> None:
        """Launch the draw.

        Args:
            logits: ``[N, V]``, contiguous.
            counts: whether some row has a top-k.
            said, penalties: int16 ``[N, V]`` and float64 ``[N, 3]``, see `kernels.draws.scores_of`.
        """
        vocab, parts, width, penalised = self._vocab, self._parts, self._width, said is not None
        said = self.drawn if said is None else said
        penalties = self._top_p if penalties is None else penalties
        scan = _SCAN_PENALISED if penalised else _SCAN
        self._weights.zero_()
        if counts:
            self._counts.zero_()
        draws.find_peaks[(parts, self._count)](
            logits, said, penalties, self._limits, self._peaks, parts, width, vocab, _BLOCK,
            penalised,
        )  # fmt: skip
        draws.weigh[(parts, self._count)](
            logits, said, penalties, self._limits, self._temperatures, self._peaks, self._weights,
            self._counts, parts, width, vocab, _BLOCK, counts, penalised,
        )  # fmt: skip
        draws.draw[(self._count,)](
            logits, said, penalties, self._limits, self._temperatures, self._top_k, self._top_p,
            self.points, self.step, self._peaks, self._weights, self._counts,
            self._scratch.keys, self._scratch.ids, self.drawn, parts, vocab, scan, _FOUND, counts,
            penalised, self._steps, num_warps=_WARPS,
        )  # fmt: skip
