"""Draws from whole rows on their device, where sorting them takes less than copying them.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2kit.backend.slots import BROKEN, Cut, Edit
from qwen2kit_torch.engine.logits import DeviceLogits, below, edited
from qwen2kit_torch.engine.memory import bounded_by_memory

_ROWS_AT_A_TIME = 32  # 200 MB for a vocabulary of 152 thousand


class SortedLogits(DeviceLogits):
    """Implements `qwen2kit.backend.slots.DrawingLogits`."""

    @bounded_by_memory
    @torch.inference_mode()
    def draw(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> list[int]:
        """Ids drawn from some rows; see the protocol."""
        parts = []
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            some = slice(start, start + _ROWS_AT_A_TIME)
            index = torch.tensor(list(rows[some]), device=self._logits.device)
            raw_NV = below(self._logits[index].float(), edits[some])
            scores_NV = edited(raw_NV, edits[some])
            parts.append(_drawn(scores_NV, [e.temperature for e in edits[some]], cuts[some]))
        found: list[int] = torch.cat(parts).tolist()
        return found


def logits_on_device(logits_NV: Tensor) -> DeviceLogits:
    """The kind of logits that serves the device best."""
    kind = DeviceLogits if logits_NV.device.type == "cpu" else SortedLogits
    return kind(logits_NV)


def _drawn(scores_NV: Tensor, temperatures: Sequence[float], cuts: Sequence[Cut]) -> Tensor:
    """int64 ``[N]``: ids, `BROKEN` where a row holds NaN or +inf, or nothing finite."""
    device, vocab = scores_NV.device, scores_NV.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    scores_NV, ids_NV = scores_NV.sort(dim=-1, descending=True, stable=True)
    best = scores_NV[:, :1]  # NaN if there is one
    steps = (scores_NV - best).double() / column([t or 1.0 for t in temperatures])
    sums_NV = steps.exp().cumsum(-1)
    kept = (scores_NV > -torch.inf).sum(-1, keepdim=True)
    if any(cut.top_k for cut in cuts):
        top_k = torch.tensor([cut.top_k or vocab for cut in cuts], device=device)[:, None]
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
