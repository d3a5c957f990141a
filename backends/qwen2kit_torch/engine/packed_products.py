"""Launching the kernels for matrices in 4 or 8 bits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qwen2kit_torch.engine.joined import Matrix
from qwen2kit_torch.engine.kernels import packed
from qwen2kit_torch.quantized import Quantized

# More rows than this are worth expanding the matrix for the vendor's product.
_MOST_ROWS = 64


def product(x: Tensor, matrix: Matrix, out: Tensor, bias: Tensor | None = None) -> None:
    """``out = x @ matrix.T + bias`` for rows ``x`` ``[R, D]``."""
    if isinstance(matrix, Quantized):
        if len(x) <= _MOST_ROWS:
            _packed_rows(x, matrix, out, bias)
            return
        matrix = dequantize(matrix, x.dtype)
    if bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias, x, matrix.t(), out=out)


def operands(matrix: Matrix) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]:
    """What kernels of a single row take: weights (or codes), scales and offsets; bits and group.

    Dense weights have 0 bits, and stand in for scales and offsets, which are not read then.
    """
    if isinstance(matrix, Quantized):
        return (matrix.codes, matrix.scales, matrix.offsets), (matrix.bits, matrix.group)
    return (matrix, matrix, matrix), (0, 1)


def dequantize(matrix: Quantized, dtype: torch.dtype) -> Tensor:
    """The dense matrix ``[N, D]``, each value rounded once."""
    height, width = matrix.shape
    dense = torch.empty(height, width, dtype=dtype, device=matrix.codes.device)
    block = 1024
    packed.expand[(height, triton.cdiv(matrix.codes.shape[1], block))](
        matrix.codes, matrix.scales, matrix.offsets, dense, width, block, matrix.bits, matrix.group
    )
    return dense


def _packed_rows(x: Tensor, matrix: Quantized, out: Tensor, bias: Tensor | None) -> None:
    height, width = matrix.shape
    rows = 16 if len(x) <= 16 else 32 if len(x) <= 32 else 64
    block = 32 if height < 4096 else 64
    packed.packed_rows[(triton.cdiv(height, block), triton.cdiv(len(x), rows))](
        x, matrix.codes, matrix.scales, matrix.offsets, x if bias is None else bias, out, len(x),
        height, width, bias is not None, rows, block, matrix.bits, matrix.group,
        num_warps=4, num_stages=4,
    )  # fmt: skip
