"""Draws by kernels of their own: what to pass to `kernels.draws`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from qwen2kit.backend.slots import Cut, Edit
from qwen2kit_torch.engine.kernels import draws
from qwen2kit_torch.engine.logits import edited
from qwen2kit_torch.engine.sorted_logits import SortedLogits

_PROGRAMS = 1056
_BLOCK = 2048
_SCAN = 4096
_FOUND = 1024
_WARPS = 8


class DrawnLogits(SortedLogits):
    """`SortedLogits` that draws from the logits where they are."""

    quick = True
    at_a_time = 128

    def _drawn(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> Tensor:
        logits = self._logits
        if list(rows) != list(range(len(logits))):
            logits = logits[torch.tensor(list(rows), device=logits.device)]
        if any(edit.ids is not None or edit.allowed is not None for edit in edits):
            logits = edited(logits.float(), edits)
        return drawn(logits.contiguous(), edits, cuts)


def drawn(logits: Tensor, edits: Sequence[Edit], cuts: Sequence[Cut]) -> Tensor:
    """int32 ``[N]``: ids, `BROKEN` where there is none.

    Args:
        logits: ``[N, V]``, contiguous; of the edits only limit and temperature are left to do.
    """
    count, vocab = logits.shape
    device = logits.device

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    cold = [edit.temperature == 0 for edit in edits]
    columns = torch.tensor(
        [
            [vocab if edit.limit is None else edit.limit for edit in edits],
            [edit.temperature or 1.0 for edit in edits],
            [0 if still else cut.top_k for still, cut in zip(cold, cuts, strict=True)],
            [1.0 if still else cut.top_p for still, cut in zip(cold, cuts, strict=True)],
            [0.0 if still else cut.point for still, cut in zip(cold, cuts, strict=True)],
        ],
        dtype=torch.float64,
    ).to(device, non_blocking=True)
    limits, top_k = columns[0].int(), columns[2].int()
    counts = any(cut.top_k for cut in cuts)
    most = min(draws.MOST_PARTS, triton.cdiv(vocab, _BLOCK), _PROGRAMS // count)
    width = triton.cdiv(triton.cdiv(vocab, max(1, most)), _BLOCK) * _BLOCK
    parts = triton.cdiv(vocab, width)
    peaks = torch.empty(count, parts, device=device)
    weights = zeros(torch.float64, count, draws.BUCKETS)
    numbers = zeros(torch.int32, count if counts else 1, draws.BUCKETS)
    scratch = torch.empty(2, count, vocab, dtype=torch.int32, device=device)
    found = torch.empty(count, dtype=torch.int32, device=device)
    draws.find_peaks[(parts, count)](logits, limits, peaks, parts, width, vocab, _BLOCK)
    draws.weigh[(parts, count)](
        logits, limits, columns[1], peaks, weights, numbers, parts, width, vocab, _BLOCK, counts
    )
    draws.draw[(count,)](
        logits, limits, columns[1], top_k, columns[3], columns[4], peaks, weights, numbers,
        scratch[0], scratch[1], found, parts, vocab, _SCAN, _FOUND, counts, num_warps=_WARPS,
    )  # fmt: skip
    return found
