"""Logits that kernels of their own draw from, where they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwen2kit.backend.slots import Cut, Edit
from qwen2kit_torch.engine.draws import Draws
from qwen2kit_torch.engine.logits import edited
from qwen2kit_torch.engine.sending import sent
from qwen2kit_torch.engine.sorted_logits import SortedLogits


class DrawnLogits(SortedLogits):
    """`SortedLogits` that draws from the logits where they are."""

    quick = True
    at_a_time = 128

    def _drawn(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> Tensor:
        logits = self._logits
        if list(rows) != list(range(len(logits))):
            logits = logits[sent(list(rows), logits.device)]
        if any(edit.ids is not None or edit.allowed is not None for edit in edits):
            logits = edited(logits.float(), edits)
        draws = Draws(len(logits), logits.shape[1], logits.device)
        draws.set(edits, cuts)
        draws.run(logits.contiguous(), counts=any(cut.top_k for cut in cuts))
        return draws.drawn
