"""LoRA beside a matrix: the base stays as it is stored, dense or packed.

One pair of small products serves a whole matrix, also one that is stacked from several (q, k, v):
the A factors are put on top of each other, the B factors on a block diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from qwen2kit.adapters.lora import LowRank
from qwen2kit_mlx.kernels import Kernels, gated
from qwen2kit_mlx.linear import Matrix


class LoRA:
    """``base(x) + (x @ down.T) @ up.T``.

    Args:
        kernels: who computes the products.
        base: the matrix ``[out, in]`` that is adapted.
        down: A ``[r, in]`` in the compute dtype.
        up: ``scale * B`` ``[out, r]`` in the compute dtype.
    """

    def __init__(self, kernels: Kernels, base: Matrix, down: mx.array, up: mx.array) -> None:
        self.kernels, self.base, self.down, self.up = kernels, base, down, up
        self.bias = base.bias

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        narrow = self.kernels.linear(x, self.down.T, None)
        return self.kernels.linear(narrow, self.up.T, self.base(x, onto))

    def swiglu(self, x: mx.array) -> mx.array:
        return gated(self.kernels, self(x))

    def dense_rows(self, start: int, stop: int) -> mx.array:
        base = self.base.dense_rows(start, stop)
        update = self.up[start:stop].astype(mx.float32) @ self.down.astype(mx.float32)
        return (base.astype(mx.float32) + update).astype(base.dtype)

    def arrays(self) -> tuple[mx.array, ...]:
        return (*self.base.arrays(), self.down, self.up)


def adapt(
    kernels: Kernels,
    base: Matrix,
    sizes: Sequence[int],
    updates: Sequence[LowRank | None],
    dtype: mx.Dtype,
) -> Matrix:
    """``base`` with the updates of its parts; ``base`` itself where there are none.

    Args:
        base: parts of ``sizes`` output rows, one after the other.
        updates: of each part, or None.
        dtype: compute dtype.
    """
    present = [update for update in updates if update is not None]
    if not present:
        return base
    down = np.concatenate([update.a.float32() for update in present])
    up = np.zeros((sum(sizes), len(down)), dtype=np.float32)
    row = column = 0
    for size, update in zip(sizes, updates, strict=True):
        if update is not None:
            block = update.b.float32() * np.float32(update.scale)
            up[row : row + size, column : column + update.rank] = block
            column += update.rank
        row += size
    return LoRA(kernels, base, mx.array(down).astype(dtype), mx.array(up).astype(dtype))
