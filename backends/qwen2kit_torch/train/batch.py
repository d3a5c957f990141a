"""A host batch as micro-batches on the device: this process's part, and what it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.backend.protocol import TokenBatch
from qwen2kit_torch.attention import Attend, Visibility, visibilities
from qwen2kit_torch.parallel.context import (
    GatheredAttend,
    chunks_of,
    gathered_positions,
    positions_of,
)
from qwen2kit_torch.train.flash import FlashAttend
from qwen2kit_torch.train.segments import VarlenAttend, segments


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass: B rows, T tokens of each held here, N supervised positions.

    Attributes:
        tokens: int64 ``[B, T]``.
        positions: int64 ``[B, T]``, or None where every row counts from 0.
        length: tokens of a whole row, an upper bound of ``positions``.
        visible: attention for every window length in use.
        where: int64 ``[N]``, supervised positions in the flattened ``B * T``, or None for all.
        labels: int64 ``[N]``, what to predict there.
    """

    tokens: Tensor
    positions: Tensor | None
    length: int
    visible: dict[int | None, Attend]
    where: Tensor | None
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How batches are cut.

    Attributes:
        rows: rows per micro-batch.
        device: where tensors go.
        windows: sliding-window lengths of the model's layers (None is full attention).
        fixed: keep every micro-batch and its full length, because compiled code or other
            processes count on equal shapes; otherwise trailing padding and micro-batches
            without supervised tokens are left out.
        varlen: use flash attention's varlen kernels for packed rows, not masks.
        flash: use FlashAttention 4 for whole and, with ``varlen``, for packed rows.
        cp: the context-parallel group, None without.
    """

    rows: int
    device: torch.device
    windows: tuple[int | None, ...]
    fixed: bool = False
    varlen: bool = False
    flash: bool = False
    cp: dist.ProcessGroup | None = None

    def __call__(self, batch: TokenBatch) -> Iterator[MicroBatch]:
        """``batch`` in slices of ``rows`` rows."""
        for start in range(0, len(batch.tokens), self.rows):
            part = slice(start, start + self.rows)
            length = batch.tokens.shape[1]
            if not self.fixed:
                used = (batch.documents[part] >= 0).any(axis=0)
                length = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
                if not (batch.labels[part, :length] >= 0).any():
                    continue
            yield self._micro(
                batch.tokens[part, :length],
                batch.labels[part, :length],
                batch.positions[part, :length],
                batch.documents[part, :length],
            )

    def _micro(
        self,
        tokens: NDArray[np.int32],
        labels: NDArray[np.int32],
        positions: NDArray[np.int32],
        documents: NDArray[np.int32],
    ) -> MicroBatch:
        length = tokens.shape[1]
        plain = _plain(positions, documents)
        here = positions_of(*self._place, length)
        flat = labels[:, here].reshape(-1)
        where = np.flatnonzero(flat >= 0)
        everything = len(where) == len(flat)
        counting = plain and self.cp is None
        return MicroBatch(
            tokens=self._move(tokens[:, here]),
            positions=None if counting else self._move(positions[:, here]),
            length=length,
            visible=self._visible(documents, plain),
            where=None if everything else self._move(where),
            labels=self._move(flat[where]),
        )

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and size of the context-parallel group."""
        return (0, 1) if self.cp is None else (self.cp.rank(), self.cp.size())

    def _visible(self, documents: NDArray[np.int32], plain: bool) -> dict[int | None, Attend]:
        if plain and self.cp is None:
            visible = self._whole(documents)
        elif self.varlen:
            visible = self._segments(documents)
        else:
            visible = self._masks(documents, plain)
        if self.cp is None:
            return visible
        return {window: GatheredAttend(self.cp, inner) for window, inner in visible.items()}

    def _whole(self, documents: NDArray[np.int32]) -> dict[int | None, Attend]:
        if not self.flash:
            return self._masks(documents, plain=True)
        length = documents.shape[1]
        reached = {w: None if w is None or w >= length else w for w in self.windows}
        return {window: FlashAttend(reach) for window, reach in reached.items()}

    def _masks(self, documents: NDArray[np.int32], plain: bool) -> dict[int | None, Attend]:
        length = documents.shape[1]
        if self.cp is None:
            numbers = None if plain else self._move(documents)
            found = visibilities(
                self.windows, start=0, length=length, documents=numbers, device=self.device
            )
            return dict(found)
        queries = positions_of(*self._place, length)
        keys = gathered_positions(self._place[1], length)
        distance = queries[:, None] - keys
        same = documents[:, queries, None] == documents[:, None, keys]
        masks: dict[int | None, Attend] = {}
        for window in self.windows:
            seen = (distance >= 0) & (True if window is None else distance < window)
            mask = self._upload((seen & same)[:, None])
            masks[window] = Visibility(mask, causal=False)
        return masks

    def _segments(self, documents: NDArray[np.int32]) -> dict[int | None, Attend]:
        rank, size = self._place
        length = documents.shape[1]
        count = 1 if size == 1 else 2 * size
        found = segments(documents, chunks_of(rank, size), count, gathered_positions(size, length))
        starts, keys = self._upload(found.query_starts), self._upload(found.key_starts)
        index = None if found.keys is None else self._move(found.keys)
        return {w: VarlenAttend(starts, keys, index, length, w, self.flash) for w in self.windows}

    def _move(self, values: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        return self._upload(values.astype(np.int64))

    def _upload(self, values: NDArray[Any]) -> Tensor:
        """``values`` on the device, without waiting for what is queued there."""
        host = torch.from_numpy(values)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)


def _plain(positions: NDArray[np.int32], documents: NDArray[np.int32]) -> bool:
    """Whether every row is document 0 from position 0 on, followed by padding only."""
    inside = documents == 0
    one_document = bool(((documents == -1) | inside).all())
    padding_last = bool((np.diff(documents, axis=1) <= 0).all())
    counting = bool((positions == np.arange(positions.shape[1]))[inside].all())
    return one_document and padding_last and counting
