"""A host batch as micro-batches on the device, trimmed of what need not be computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.backend.protocol import TokenBatch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass: B rows, T tokens, N supervised positions.

    Attributes:
        tokens: int64 ``[B, T]``.
        positions, documents: int64 ``[B, T]``, or None where every row is one document that
            starts at position 0, so that plain causal attention is exact.
        where: int64 ``[N]``, supervised positions in the flattened ``B * T``.
        labels: int64 ``[N]``, what to predict there.
    """

    tokens: Tensor
    positions: Tensor | None
    documents: Tensor | None
    where: Tensor
    labels: Tensor


def micro_batches(batch: TokenBatch, rows: int, device: torch.device) -> Iterator[MicroBatch]:
    """``batch`` in slices of ``rows`` rows; slices without any supervised position are left out."""
    for start in range(0, len(batch.tokens), rows):
        part = slice(start, start + rows)
        used = (batch.documents[part] >= 0).any(axis=0)
        length = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
        labels = batch.labels[part, :length]
        where = np.flatnonzero(labels >= 0)
        if len(where) == 0:
            continue
        positions, documents = batch.positions[part, :length], batch.documents[part, :length]
        packed = not _plain(positions, documents)
        yield MicroBatch(
            tokens=_move(batch.tokens[part, :length], device),
            positions=_move(positions, device) if packed else None,
            documents=_move(documents, device) if packed else None,
            where=_move(where, device),
            labels=_move(labels.reshape(-1)[where], device),
        )


def _plain(positions: NDArray[np.int32], documents: NDArray[np.int32]) -> bool:
    """Whether every row is document 0 from position 0 on, followed by padding only."""
    inside = documents == 0
    one_document = bool(((documents == -1) | inside).all())
    padding_last = bool((np.diff(documents, axis=1) <= 0).all())
    counting = bool((positions == np.arange(positions.shape[1]))[inside].all())
    return one_document and padding_last and counting


def _move(values: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)
