"""Logits that stay on their device: only what is asked for is copied to the host.

Shapes: N rows, V vocabulary, k shortlist, E edited logits of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.backend.slots import BROKEN, Edit, Shortlist
from qwen2kit_torch.engine.memory import bounded_by_memory
from qwen2kit_torch.engine.sending import sent


class DeviceLogits:
    """Implements `qwen2kit.backend.slots.Logits`. All methods raise BackendError if the device is
    out of memory.

    Args:
        logits_NV: in the compute dtype.
    """

    def __init__(self, logits_NV: Tensor) -> None:
        self._logits = logits_NV

    @bounded_by_memory
    @torch.inference_mode()
    def greedy(self, limit: int | None) -> list[int]:
        """The most likely id below ``limit`` of each row, the smallest of equals; or `BROKEN`."""
        best, ids = self._logits[:, :limit].max(-1)
        found = torch.stack([ids.double(), best.double()]).cpu().numpy()
        return [int(token) for token in np.where(np.isfinite(found[1]), found[0], BROKEN)]

    @bounded_by_memory
    @torch.inference_mode()
    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        """The ``size`` most likely ids of every row after its edit."""
        raw = below(self._logits.float(), edits, size)
        scores = edited(raw, edits)
        warmth = [e.temperature or 1.0 for e in edits]
        top, ids = scores.topk(min(size, scores.shape[1]))
        totals = [_log_sum_exp(scores, warmth)]
        as_is = scores is raw and all(value == 1 for value in warmth)
        totals.append(totals[0] if as_is else _log_sum_exp(raw, [1.0] * len(edits)))
        parts = [ids, top, raw.gather(1, ids), *(total[:, None] for total in totals)]
        found = torch.cat([part.double() for part in parts], dim=1).cpu().numpy()
        found_ids, found_scores, found_raw = np.split(found[:, :-2], 3, axis=1)
        return Shortlist.in_order(found_ids, found_scores, found[:, -2], found_raw, found[:, -1])

    @bounded_by_memory
    @torch.inference_mode()
    def rows(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Unedited float32 logits ``[len(rows), V]``."""
        index = sent(list(rows), self._logits.device, np.int64)
        found: NDArray[np.float32] = self._logits[index].float().cpu().numpy()
        return found


def below(raw_NV: Tensor, edits: Sequence[Edit], least: int = 0) -> Tensor:
    """Logits below each row's limit; the others are left out if that leaves more than ``least``
    and limits agree, else -inf."""
    vocab = raw_NV.shape[1]
    limits = [vocab if edit.limit is None else min(edit.limit, vocab) for edit in edits]
    most = max(limits, default=vocab)
    most = vocab if most <= least else most
    raw_NV = raw_NV[:, :most]
    if all(limit == most for limit in limits):
        return raw_NV
    ends = sent(limits, raw_NV.device)[:, None]
    return raw_NV.masked_fill(torch.arange(most, device=raw_NV.device) >= ends, -torch.inf)


def _log_sum_exp(scores_NV: Tensor, warmth: Sequence[float]) -> Tensor:
    """float64 ``[N]``, of scores over ``warmth``; terms are float32, their sum float64."""
    divisors = sent(warmth, scores_NV.device, np.float64)
    best = scores_NV.amax(-1, keepdim=True)
    terms = (scores_NV - best).div_(divisors.float()[:, None]).exp_()
    return best[:, 0].double() / divisors + terms.sum(-1, dtype=torch.float64).log()


def edited(raw_NV: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Logits after penalties, biases and masks."""
    scores = raw_NV
    changed = [(row, edit) for row, edit in enumerate(edits) if edit.ids is not None]
    if changed:
        scores = raw_NV.clone(memory_format=torch.contiguous_format)
        rows, ids, scale, shift = sent(_joined(changed), raw_NV.device)
        places = rows.long() * raw_NV.shape[1] + ids.long()
        value = scores.view(-1)[places]
        value = torch.where(value > 0, value / scale.float(), value * scale.float())
        scores.view(-1)[places] = value + shift.float()
    masked = [(row, edit.allowed) for row, edit in enumerate(edits) if edit.allowed is not None]
    if masked:
        bits = np.stack([allowed for _, allowed in masked]).view(np.int32)
        rows = sent([row for row, _ in masked], raw_NV.device)
        words = sent(bits, raw_NV.device)
        ids = torch.arange(raw_NV.shape[1], device=raw_NV.device)
        banned = (words[:, ids // 32] >> (ids % 32).int()) & 1 == 0
        scores = scores.index_put((rows,), scores[rows].masked_fill(banned, -torch.inf))
    return scores


def _joined(changed: Sequence[tuple[int, Edit]]) -> NDArray[np.float64]:
    """Row, id, scale and shift of every edited logit, float64 ``[4, E]``."""
    ids = [edit.ids for _, edit in changed if edit.ids is not None]
    sizes = [len(part) for part in ids]
    found = np.empty((4, sum(sizes)))
    found[0] = np.repeat([row for row, _ in changed], sizes)
    np.concatenate(ids, out=found[1], casting="unsafe")
    for line, name, neutral in ((2, "scale", 1.0), (3, "shift", 0.0)):
        parts = [getattr(edit, name) for _, edit in changed]
        if all(part is None for part in parts):
            found[line] = neutral
            continue
        filled = [
            np.full(size, neutral) if part is None else part
            for size, part in zip(sizes, parts, strict=True)
        ]
        np.concatenate(filled, out=found[line])
    return found
