"""Draws from whole rows on their device, where sorting them takes less than copying them.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen2kit.backend.slots import BROKEN, Cut, Edit
from qwen2kit_torch.engine.logits import DeviceLogits, below, edited
from qwen2kit_torch.engine.memory import bounded_by_memory
from qwen2kit_torch.engine.sending import sent


class SortedLogits(DeviceLogits):
    """Implements `qwen2kit.backend.slots.DrawingLogits`.

    Attributes:
        at_a_time: most rows that scratch memory is taken for.
    """

    quick = False
    at_a_time = 32  # 200 MB for a vocabulary of 152 thousand

    @bounded_by_memory
    @torch.inference_mode()
    def draw(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> list[int]:
        """Ids drawn from some rows; see the protocol."""
        starts = range(0, len(rows), self.at_a_time)
        portions = [slice(start, start + self.at_a_time) for start in starts]
        parts = [self._drawn(rows[some], edits[some], cuts[some]) for some in portions]
        found: list[int] = torch.cat(parts).tolist()
        return found

    def _drawn(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> Tensor:
        index = sent(list(rows), self._logits.device, np.int64)
        scores_NV = edited(below(self._logits[index].float(), edits), edits)
        return _sorted_and_drawn(scores_NV, [edit.temperature for edit in edits], cuts)


def _sorted_and_drawn(
    scores_NV: Tensor, temperatures: Sequence[float], cuts: Sequence[Cut]
) -> Tensor:
    """int64 ``[N]``: ids, `BROKEN` where a row holds NaN or +inf, or nothing finite."""
    device, vocab = scores_NV.device, scores_NV.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return sent(values, device, np.float64)[:, None]

    scores_NV, ids_NV = scores_NV.sort(dim=-1, descending=True, stable=True)
    best = scores_NV[:, :1]  # NaN if there is one
    steps = (scores_NV - best).double() / column([t or 1.0 for t in temperatures])
    sums_NV = steps.exp().cumsum(-1)
    kept = (scores_NV > -torch.inf).sum(-1, keepdim=True)
    if any(cut.top_k for cut in cuts):
        top_k = sent([cut.top_k or vocab for cut in cuts], device)[:, None]
        kth = scores_NV.gather(1, torch.minimum(top_k, kept).sub(1).clamp(min=0))
        kept = torch.minimum(kept, (scores_NV >= kth).sum(-1, keepdim=True))
    last = (kept - 1).clamp(min=0)
    if any(cut.top_p < 1 for cut in cuts):
        mass = column([cut.top_p for cut in cuts]) * sums_NV.gather(1, last)
        inside = torch.searchsorted(sums_NV, mass)
        last = torch.where(column([cut.top_p for cut in cuts]) < 1, inside.minimum(last), last)
    mass = column([cut.point for cut in cuts]) * sums_NV.gather(1, last)
    place = torch.searchsorted(sums_NV, mass, right=True).minimum(last)
    place = torch.where(column(temperatures) > 0, place, 0)
    found = torch.where(best.isfinite(), ids_NV.gather(1, place), BROKEN)
    return found[:, 0]
