"""Launching the kernels for matrices in 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from qwen2kit_torch.engine.joined import Matrix
from qwen2kit_torch.engine.kernels import packed
from qwen2kit_torch.engine.tuning import RowsTile, rows_tile
from qwen2kit_torch.quantized import Quantized

# Rows of one launch, and more than which are worth expanding the matrix for the vendor's product.
MOST_ROWS = 64
EXPANDED = 192


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the programs of one product leave for each other; products one after the other may
    share it.

    Attributes:
        parts: float32, at least as many as `kernels.packed.packed_rows` asks for.
        arrived: int32, zeros, one for each block of outputs.
    """

    parts: Tensor
    arrived: Tensor


def scratch_for(
    matrices: list[Quantized], rows: int, itemsize: int, tile: RowsTile | None = None
) -> Scratch | None:
    """Enough for every launch of products of ``matrices`` with ``rows`` rows of numbers of
    ``itemsize`` bytes; None where none is needed."""
    if not matrices or rows > EXPANDED:
        return None
    launches = {some.stop - some.start for some in portions(rows)}
    tiles = [
        (matrix.shape[0], tile or _tile(matrix, count, itemsize))
        for matrix in matrices
        for count in launches
    ]
    parts = [
        each.padded(height) * each.rows * each.splits if each.splits > 1 else 1
        for height, each in tiles
    ]
    blocks = [each.padded(height) // each.block for height, each in tiles]
    device = matrices[0].codes.device
    return Scratch(
        torch.empty(max(parts), dtype=torch.float32, device=device),
        torch.zeros(max(blocks), dtype=torch.int32, device=device),
    )


def portions(rows: int) -> list[slice]:
    """The rows of each launch."""
    return [slice(start, min(start + MOST_ROWS, rows)) for start in range(0, rows, MOST_ROWS)]


def product(
    x: Tensor,
    matrix: Matrix,
    out: Tensor,
    bias: Tensor | None = None,
    scratch: Scratch | None = None,
) -> None:
    """``out = x @ matrix.T + bias`` for rows ``x`` ``[R, D]``."""
    if isinstance(matrix, Quantized):
        if len(x) <= EXPANDED:
            for some in portions(len(x)):
                packed_rows(x[some], matrix, out[some], bias, scratch)
            return
        matrix = dequantize(matrix, x.dtype)
    if bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias, x, matrix.t(), out=out)


def operands(matrix: Matrix) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """What kernels of a single row take: weights (or codes) and steps; bits and group.

    Dense weights have 0 bits, and stand in for steps, which are not read then.
    """
    if isinstance(matrix, Quantized):
        return (matrix.codes, matrix.steps), (matrix.bits, matrix.group)
    return (matrix, matrix), (0, 1)


def dequantize(matrix: Quantized, dtype: torch.dtype) -> Tensor:
    """The dense matrix ``[N, D]``, each value rounded once."""
    height, width = matrix.shape
    dense = torch.empty(height, width, dtype=dtype, device=matrix.codes.device)
    block = 1024
    packed.expand[(height, triton.cdiv(width * matrix.bits // 8, block))](
        matrix.codes, matrix.steps, dense, width, block, matrix.bits, matrix.group
    )
    return dense


def packed_rows(
    x: Tensor,
    matrix: Quantized,
    out: Tensor,
    bias: Tensor | None,
    scratch: Scratch | None = None,
    tile: RowsTile | None = None,
) -> None:
    """`product` of up to `MOST_ROWS` rows with codes; ``tile`` instead of the default."""
    height, width = matrix.shape
    tile = tile or _tile(matrix, len(x), x.itemsize)
    scratch = scratch or scratch_for([matrix], len(x), x.itemsize, tile)
    assert scratch is not None
    packed.packed_rows[(tile.padded(height) // tile.block, tile.splits)](
        x, matrix.codes, matrix.steps, x if bias is None else bias, out,
        scratch.parts, scratch.arrived, len(x), height, width, bias is not None,
        tile.rows, tile.block, tile.span, tile.splits, tile.stages, matrix.bits, matrix.group,
        num_warps=tile.warps,
    )  # fmt: skip


def _tile(matrix: Quantized, rows: int, itemsize: int) -> RowsTile:
    height, width = matrix.shape
    return rows_tile(height, width, rows, matrix.bits, itemsize)
