"""Logits that stay on the device; what crosses to the host is small.

Shape suffixes: N rows, V vocabulary, D hidden, k shortlist, n edited ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.slots import BROKEN, Edit, Shortlist
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.memory import bounded_by_memory
from qwen2kit_mlx.model import Decoder

LOGIT_ROWS = 128  # positions whose vocabulary row exists at the same time
FEWER = "fewer slots, a shorter context, or a model of fewer bits"


class DeviceLogits:
    """See `qwen2kit.backend.slots.Logits`.

    Args:
        decoder: the model.
        hidden_ND: residual stream of the wanted positions.
        device: where to compute.
    """

    def __init__(self, decoder: Decoder, hidden_ND: mx.array, device: mx.Device) -> None:
        self._decoder, self._hidden_ND, self._device = decoder, hidden_ND, device
        self._only: mx.array | None = None

    @bounded_by_memory(FEWER)
    def greedy(self, limit: int | None) -> list[int]:
        """See `Logits.greedy`."""
        with mx.stream(self._device):
            found = [best_ids(self._slice(rows), limit) for rows in self._slices()]
            return [token for part in found for token in np.asarray(part).tolist()]

    @bounded_by_memory(FEWER)
    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        """See `Logits.shortlist`."""
        parts = []
        with mx.stream(self._device):
            for rows in self._slices():
                parts.append(
                    _shortlist(self._decoder.kernels, self._slice(rows), size, edits[rows])
                )
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return Shortlist.in_order(*columns)

    @bounded_by_memory(FEWER)
    def rows(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """See `Logits.rows`."""
        if not rows:
            return np.empty((0, self._decoder.spec.vocab_size), dtype=np.float32)
        with mx.stream(self._device):
            index = mx.array(list(rows), dtype=mx.int32)
            if self._only is None:
                found = self._decoder.logits(self._hidden_ND[index])
            else:
                found = self._only[index]
            return np.array(found.astype(mx.float32))

    def _slices(self) -> list[slice]:
        return [slice(i, i + LOGIT_ROWS) for i in range(0, self._hidden_ND.shape[0], LOGIT_ROWS)]

    def _slice(self, rows: slice) -> mx.array:
        if self._hidden_ND.shape[0] > LOGIT_ROWS:
            return self._decoder.logits(self._hidden_ND[rows])
        if self._only is None:
            self._only = self._decoder.logits(self._hidden_ND)
        return self._only


def best_ids(logits_NV: mx.array, limit: int | None) -> mx.array:
    """int32 ``[N]``: the most likely id below ``limit`` of each row, or `BROKEN`."""
    logits_NV = logits_NV[:, :limit]
    peak_N = mx.max(logits_NV, axis=-1)  # NaN if any is
    best_N = mx.argmax(logits_NV, axis=-1).astype(mx.int32)
    return mx.where(mx.abs(peak_N) < mx.inf, best_N, BROKEN)


def _shortlist(
    kernels: Kernels, logits_NV: mx.array, size: int, edits: Sequence[Edit]
) -> tuple[NDArray[np.generic], ...]:
    """What `Shortlist.in_order` takes."""
    vocab = logits_NV.shape[-1]
    raw_NV = _below(logits_NV.astype(mx.float32), [edit.limit for edit in edits])
    edited_NV = _allowed(_shifted(raw_NV, edits), edits)
    warmth_N1 = mx.array([[edit.temperature or 1.0] for edit in edits])
    size = min(size, vocab)
    found = (
        mx.argpartition(-edited_NV, size - 1, axis=-1)[:, :size]
        if size < vocab
        else mx.broadcast_to(mx.arange(vocab), edited_NV.shape)
    )
    outputs = (
        found,
        mx.take_along_axis(edited_NV, found, axis=-1),
        kernels.log_sum_exp(edited_NV / warmth_N1),
        mx.take_along_axis(raw_NV, found, axis=-1),
        kernels.log_sum_exp(raw_NV),
    )
    mx.eval(outputs)
    return tuple(np.asarray(array) for array in outputs)


def _below(logits_NV: mx.array, limits: Sequence[int | None]) -> mx.array:
    vocab = logits_NV.shape[-1]
    ends = [vocab if limit is None else limit for limit in limits]
    if min(ends) >= vocab:
        return logits_NV
    inside_NV = mx.arange(vocab) < mx.array(ends)[:, None]
    return mx.where(inside_NV, logits_NV, -mx.inf)


def _shifted(raw_NV: mx.array, edits: Sequence[Edit]) -> mx.array:
    """Penalties and biases; rows with fewer ids than the longest repeat one of theirs."""
    longest = max((len(edit.ids) for edit in edits if edit.ids is not None), default=0)
    if not longest:
        return raw_NV
    ids = np.zeros((len(edits), longest), dtype=np.int64)
    scale = np.ones(ids.shape, dtype=np.float32)
    shift = np.zeros(ids.shape, dtype=np.float32)
    for row, edit in enumerate(edits):
        if edit.ids is None or not len(edit.ids):
            continue
        repeated = np.resize(np.arange(len(edit.ids)), longest)
        ids[row] = edit.ids[repeated]
        if edit.scale is not None:
            scale[row] = edit.scale[repeated]
        if edit.shift is not None:
            shift[row] = edit.shift[repeated]
    index, factor = mx.array(ids), mx.array(scale)
    old = mx.take_along_axis(raw_NV, index, axis=-1)
    new = mx.where(old > 0, old / factor, old * factor) + mx.array(shift)
    return mx.put_along_axis(raw_NV, index, new, axis=-1)


def _allowed(edited_NV: mx.array, edits: Sequence[Edit]) -> mx.array:
    """Rows with a mask keep only the ids whose bit is set."""
    count, vocab = edited_NV.shape
    if all(edit.allowed is None for edit in edits):
        return edited_NV
    words = np.full((count, -(-vocab // 32)), 0xFFFF_FFFF, dtype=np.uint32)
    for row, edit in enumerate(edits):
        if edit.allowed is not None:
            words[row] = edit.allowed
    bits = (mx.array(words)[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(bits.reshape(count, -1)[:, :vocab] > 0, edited_NV, -mx.inf)
