"""NF4 to dense in one pass over memory, in Triton: one lane for each weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 2048


def dequantize(packed: Tensor, absmax: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values[code] * absmax`` of every weight, rounded once to ``dtype``; flat.

    Args:
        packed: uint8 ``[n / 2]``, the first code of a byte in its high half.
        absmax: float32 ``[n / block]``.
        values: the sixteen float32 values.
    """
    total = packed.numel() * 2
    dense = torch.empty(total, dtype=dtype, device=packed.device)
    block = total // absmax.numel()
    _kernel[(triton.cdiv(total, _LANES),)](packed, absmax, values, dense, total, block, _LANES)
    return dense


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    packed, absmax, values, dense, total, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = index < total
    pair = tl.load(packed + index // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(index % 2 == 0, pair >> 4, pair & 15)
    scale = tl.load(absmax + index // BLOCK, mask=inside, other=0.0)
    weight = tl.load(values + code) * scale
    tl.store(dense + index, weight.to(dense.dtype.element_ty), mask=inside)
