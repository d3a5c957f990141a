"""Cross-entropy and its gradient over one row of logits at a time, in Triton.

A row (304 kB of 151,936 logits) is read twice and overwritten once. The second reading goes
backwards and finds in the L2 cache what the first has left there, as long as few rows are under
way: one for each multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is run; found by ``benchmarks/training_kernels.py``.

    Attributes:
        lanes: columns that have a maximum and a sum of their own, a power of two.
        strips: how many of ``lanes`` columns are read at once, a power of two.
        warps: of one program.
        rows_in_flight: programs per multiprocessor; 0 starts one for every row.
    """

    lanes: int = 8192
    strips: int = 4
    warps: int = 32
    rows_in_flight: int = 1


DEFAULT: Final = Launch()


def cross_entropy_(
    logits_NV: Tensor, labels_N: Tensor, *, slope: bool, launch: Launch = DEFAULT
) -> Tensor:
    """Losses ``-log softmax(logits)[labels]``, float32 ``[N]``, in nats.

    Args:
        logits_NV: contiguous; with ``slope`` overwritten by ``softmax(logits) - one_hot(labels)``.
        labels_N: int64, all valid.
        slope: whether the gradient is wanted.
        launch: how to run it.
    """
    rows, columns = logits_NV.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    programs = rows
    if logits_NV.is_cuda and launch.rows_in_flight:
        device = torch.cuda.get_device_properties(logits_NV.device)
        programs = min(rows, launch.rows_in_flight * device.multi_processor_count)
    if rows:
        _kernel[(programs,)](
            logits_NV,
            labels_N,
            losses,
            rows,
            columns,
            SLOPE=slope,
            LANES=launch.lanes,
            STRIPS=launch.strips,
            num_warps=launch.warps,
        )
    return losses


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, rows, columns,
    SLOPE: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    block: tl.constexpr = LANES * STRIPS
    within = tl.arange(0, STRIPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    blocks = tl.cdiv(columns, block)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        line = logits + tl.cast(row, tl.int64) * columns
        label = tl.load(labels + row).to(tl.int32)
        picked = tl.load(line + label).to(tl.float32)
        # Finite, so that what a lane has not seen yet weighs nothing rather than NaN.
        peaks = tl.full((LANES,), -3.0e38, tl.float32)
        masses = tl.zeros((LANES,), tl.float32)
        for number in range(0, blocks):
            index = number * block + within
            value = tl.load(
                line + index,
                mask=index < columns,
                other=float("-inf"),
                eviction_policy="evict_last",
            ).to(tl.float32)
            higher = tl.maximum(peaks, tl.max(value, 0))
            masses = masses * tl.exp(peaks - higher) + tl.sum(tl.exp(value - higher[None, :]), 0)
            peaks = higher
        peak = tl.max(peaks, 0)
        normaliser = peak + tl.log(tl.sum(masses * tl.exp(peaks - peak), 0))
        tl.store(losses + row, normaliser - picked)
        if SLOPE:
            for number in range(0, blocks):
                index = (blocks - 1 - number) * block + within
                inside = index < columns
                value = tl.load(
                    line + index, mask=inside, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)
                gradient = tl.exp(value - normaliser) - tl.where(index == label, 1.0, 0.0)
                tl.store(
                    line + index,
                    gradient.to(logits.dtype.element_ty),
                    mask=inside,
                    eviction_policy="evict_first",
                )
