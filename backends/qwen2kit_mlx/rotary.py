"""Rotary position embedding of queries and keys, from the spec's float64 frequency table.

Float32 takes exact cosines and sines: ``mx.fast.rope`` forms the angle in float32 and is off by
1e-4 at position 2,000 and by 3e-3 at 32,000. In 16-bit dtypes that is below the rounding of the
values themselves, so there the fused kernel is used.

YaRN's attention factor scales rotated queries and keys alike, which is one factor on their
product: it is applied as `score_scale` and never touches the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.rope import RoPETable, rope_table

Rotation = Callable[[mx.array], mx.array]


class Rotary:
    """Rotations of one model.

    Attributes:
        score_scale: factor of the attention scores, ``attention_factor**2 / sqrt(head_dim)``.
    """

    def __init__(self, spec: ModelSpec, dtype: mx.Dtype) -> None:
        table = rope_table(spec)
        self.score_scale = table.attention_factor**2 / spec.head_dim**0.5
        self._dims = spec.head_dim
        self._table = RoPETable(table.inv_freq, 1.0)
        self._exact = dtype == mx.float32
        self._periods = mx.array([1.0 / w for w in table.inv_freq], dtype=mx.float32)

    def at(self, starts: Sequence[int], count: int) -> Rotation:
        """The rotation of ``[B, heads, count, head_dim]``.

        Args:
            starts: first position of each row, or of all rows if there is one.
            count: consecutive positions.
        """
        if self._exact:
            return self._by_table(np.array(starts)[:, None] + np.arange(count))
        first = starts[0]
        return self._fused(first if all(n == first for n in starts) else mx.array(list(starts)))

    def _by_table(self, positions_BT: NDArray[np.int64]) -> Rotation:
        if (positions_BT == positions_BT[0]).all():
            positions_BT = positions_BT[:1]
        rows, count = positions_BT.shape
        cos, sin = self._table.cos_sin(positions_BT.reshape(-1))
        shape = (rows, 1, count, self._dims // 2)
        cos_B1TC = mx.array(cos.astype(np.float32).reshape(shape))
        sin_B1TC = mx.array(sin.astype(np.float32).reshape(shape))

        def rotate(x_BHTC: mx.array) -> mx.array:
            a, b = mx.split(x_BHTC, 2, axis=-1)
            return mx.concatenate(
                [a * cos_B1TC - b * sin_B1TC, b * cos_B1TC + a * sin_B1TC], axis=-1
            )

        return rotate

    def _fused(self, offset: int | mx.array) -> Rotation:
        def rotate(x_BHTC: mx.array) -> mx.array:
            return mx.fast.rope(
                x_BHTC,
                self._dims,
                traditional=False,
                base=None,
                scale=1.0,
                offset=offset,
                freqs=self._periods,
            )

        return rotate
