"""Cross-entropy and its gradient over one row of logits at a time, in Triton.

A row is read twice and overwritten once. Every multiprocessor works on one row at a time, so that
the rows in flight (152k bfloat16 logits each) fit into the L2 cache, which serves the second
reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16


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
        processors = torch.cuda.get_device_properties(logits_NV.device).multi_processor_count
        _kernel[(min(rows, processors),)](
            logits_NV,
            labels_N,
            losses,
            rows,
            columns,
            SLOPE=slope,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return losses


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, rows, columns, SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = logits + tl.cast(row, tl.int64) * columns
        label = tl.load(labels + row)
        picked = tl.load(place + label).to(tl.float32)
        peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
        masses = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            index = start + tl.arange(0, BLOCK)
            value = tl.load(place + index, mask=index < columns, other=float("-inf"))
            value = value.to(tl.float32)
            higher = tl.maximum(peaks, value)
            # A lane that has seen nothing yet has peak -inf, and -inf - -inf is not a number.
            grown = masses * tl.exp(peaks - higher) + tl.exp(value - higher)
            masses = tl.where(higher == float("-inf"), 0.0, grown)
            peaks = higher
        peak = tl.max(peaks, 0)
        mass = tl.sum(masses * tl.exp(peaks - peak), 0)
        normaliser = peak + tl.log(mass)
        tl.store(losses + row, normaliser - picked)
        if SLOPE:
            for start in range(0, columns, BLOCK):
                index = start + tl.arange(0, BLOCK)
                inside = index < columns
                value = tl.load(place + index, mask=inside, other=float("-inf")).to(tl.float32)
                slope = tl.exp(value - normaliser) - tl.where(index == label, 1.0, 0.0)
                tl.store(place + index, slope.to(logits.dtype.element_ty), mask=inside)
