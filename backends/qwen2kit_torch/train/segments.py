"""Packed documents as segments of variable-length attention.

Flash attention's varlen kernels take queries and keys laid end to end, with the places where
segments begin. A causal segment whose keys outnumber its queries is aligned at the end, which is
what a piece of a document needs whose beginning another process holds (context parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit_torch.fused.flash import flash_attention

_FEWEST_SEGMENTS = 64
# Before torch 2.12 grouped heads needed no permission.
_ASKS_FOR_GROUPS = torch.__version__ >= "2.12"


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one micro-batch, its rows laid end to end.

    Attributes:
        query_starts, key_starts: int32 ``[segments + 1]``; padded with empty segments to a power
            of two, so that compiled code sees few different sizes.
        keys: int64 ``[sum of key lengths]``, which of the row-major keys belong to each segment
            in turn, or None if it is all of them in order.
    """

    query_starts: NDArray[np.int32]
    key_starts: NDArray[np.int32]
    keys: NDArray[np.int64] | None


def segments(
    documents: NDArray[np.int32], chunks: tuple[int, ...], count: int, order: NDArray[np.int64]
) -> Segments:
    """Cut the documents of every row, int32 ``[B, T]``, into segments.

    Args:
        documents: numbers that change where attention must stop.
        chunks: which of the row's ``count`` equal chunks the queries are, in their order.
        order: int64 ``[T]``, index into the row of every key in the order that keys come in.
    """
    rows, length = documents.shape
    chunk = length // count
    place = np.argsort(order)
    queries, key_lengths, keys = [], [], []
    for row, numbers in enumerate(documents):
        edges = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1, [length]])
        for start in (c * chunk for c in chunks):
            inside = edges[(edges > start) & (edges < start + chunk)]
            bounds = np.concatenate([[start], inside, [start + chunk]])
            begin = int(edges[np.searchsorted(edges, start, side="right") - 1])
            queries.append(np.diff(bounds))
            key_lengths.append(np.diff(np.concatenate([[begin], bounds[1:]])))
            keys.append(row * length + place[begin : start + chunk])
    index = np.concatenate(keys)
    whole = len(index) == rows * length and bool((np.diff(index) == 1).all())
    return Segments(
        _starts(np.concatenate(queries)),
        _starts(np.concatenate(key_lengths)),
        None if whole else index,
    )


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    ends = np.cumsum(lengths)
    size = _FEWEST_SEGMENTS
    while size < len(ends):
        size *= 2
    padded = np.full(size + 1, ends[-1], dtype=np.int32)
    padded[0], padded[1 : len(ends) + 1] = 0, ends
    return padded


@dataclass(frozen=True, slots=True)
class VarlenAttend:
    """Causal attention within segments (CUDA, bfloat16): FlashAttention 4, or torch's own 2.

    Attributes:
        query_starts, key_starts: int32, as in `Segments`.
        keys: int64 index, or None.
        longest: bound on a segment's queries and keys.
        window: keys a query sees, itself included; None is all.
        flash: use FlashAttention 4.
    """

    query_starts: Tensor
    key_starts: Tensor
    keys: Tensor | None
    longest: int
    window: int | None
    flash: bool = False

    def __call__(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        """``[B, H, T, C]``."""
        q = q_BHTC.transpose(1, 2).flatten(0, 1)
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k_BKSC, v_BKSC))
        if self.keys is not None:
            k, v = k[self.keys], v[self.keys]
        out = self._flash(q, k, v) if self.flash else self._torch(q, k, v)
        rows, _, length, _ = q_BHTC.shape
        return out.view(rows, length, *out.shape[1:]).transpose(1, 2)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = (self.query_starts, self.key_starts)
        return flash_attention(q, k, v, starts=starts, longest=self.longest, window=self.window)

    def _torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        reach = -1 if self.window is None else self.window - 1
        options: dict[str, Any] = {"window_size": (reach, 0)}
        if q.shape[1] != k.shape[1] and _ASKS_FOR_GROUPS:
            options["enable_gqa"] = True
        out = varlen_attn(
            q, k, v, self.query_starts, self.key_starts, self.longest, self.longest, **options
        )
        assert isinstance(out, Tensor)
        return out
