"""Cross-entropy and its gradient over one row of logits at a time, in Triton.

A row is read twice and overwritten once. On an H100, 8,192 rows of 151,936 logits take 2.6 ms;
the same by torch.compile takes 3.5 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, *, slope: bool) -> Tensor:
    """Losses ``-log softmax(logits)[labels]``, float32 ``[N]``, in nats.

    Args:
        logits_NV: contiguous; with ``slope`` overwritten by ``softmax(logits) - one_hot(labels)``.
        labels_N: int64, all valid.
        slope: whether the gradient is wanted.
    """
    rows, columns = logits_NV.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    if rows:
        _kernel[(rows,)](
            logits_NV, labels_N, losses, columns, SLOPE=slope, BLOCK=_BLOCK, num_warps=16
        )
    return losses


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(logits, labels, losses, columns, SLOPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    picked = tl.load(logits + label).to(tl.float32)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = tl.load(logits + index, mask=index < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peaks, value)
        # A lane that has seen nothing yet has peak -inf, and -inf - -inf is not a number.
        masses = tl.where(
            higher == float("-inf"), 0.0, masses * tl.exp(peaks - higher) + tl.exp(value - higher)
        )
        peaks = higher
    peak = tl.max(peaks, 0)
    mass = tl.sum(masses * tl.exp(peaks - peak), 0)
    normaliser = peak + tl.log(mass)
    tl.store(losses + row, normaliser - picked)
    if SLOPE:
        for start in range(0, columns, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < columns
            value = tl.load(logits + index, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(value - normaliser) - tl.where(index == label, 1.0, 0.0)
            tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=inside)
