"""Rotary position embedding of queries and keys, from the spec's float64 frequency table.

Float32 takes exact cosines and sines: ``mx.fast.rope`` forms the angle in float32 and is off by
1e-4 at position 2,000 and by 3e-3 at 32,000. In 16-bit dtypes that is below the rounding of the
values themselves, so there the fused kernel is used.

YaRN's attention factor scales rotated queries and keys alike, which is one factor on their
product: it is applied as `score_scale` and never touches the tensors.

Attention does not change when one vector is taken from all keys, since it moves all scores of a
query alike. Qwen2's key biases reach 200 in dimensions that hardly turn. In float32 keys stand less
their unrotated bias (`Rotation.drift`), which leaves the digits to what differs among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.rope import RoPETable, rope_table

MOST_ROTATIONS = 1 << 15  # by their own offsets in one operation; a GPU's grid ends at 2**16


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation of heads; called on them, it gives them rotated.

    Attributes:
        turn: what it does.
        sin, less_one: ``[..., C / 2]`` sines, and cosines less one; None in 16-bit dtypes.
    """

    turn: Callable[[mx.array], mx.array]
    sin: mx.array | None = None
    less_one: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` rotated."""
        return self.turn(x)

    def drift(self, anchor: mx.array) -> mx.array:
        """What the rotation adds to a vector that is the same at every position.

        Args:
            anchor: ``[K, 1, C]``, or ``[K, C]`` for rotations of `Rotary.stacked`.

        Returns:
            ``[K, T, C]`` or ``[B, T, K, C]``.
        """
        assert self.sin is not None
        assert self.less_one is not None
        return _turned(anchor, self.less_one, self.sin)


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

    def at(self, start: int, count: int) -> Rotation:
        """The rotation of ``[B, heads, count, head_dim]`` at ``count`` positions from ``start``."""
        if self._exact:
            return self._by_table(np.arange(start, start + count))
        return Rotation(lambda x_BHTC: self._fused(x_BHTC, start))

    def scattered(self, positions_T: NDArray[np.int64]) -> Rotation:
        """The rotation of ``[1, heads, T, head_dim]`` at any T positions."""
        if self._exact:
            return self._by_table(positions_T)
        offsets = mx.array(positions_T.astype(np.int32))

        def rotate(x_1HTC: mx.array) -> mx.array:
            return self._fused(x_1HTC.transpose(2, 1, 0, 3), offsets).transpose(2, 1, 0, 3)

        return Rotation(rotate)

    def stacked(self, positions_BT: NDArray[np.int64], turning: int, still: int) -> Rotation:
        """The rotation of ``[B, T, turning + still, head_dim]``, in which the last ``still``
        heads (values) stay as they are: a rotation by position 0, one operation for all."""
        rows, count = positions_BT.shape
        places_BTG = np.repeat(positions_BT[:, :, None], turning + still, axis=-1)
        places_BTG[:, :, turning:] = 0
        if self._exact:
            rotation = self._by_table(positions_BT[:, :, None])
            return replace(rotation, turn=self._by_table(places_BTG).turn)
        if places_BTG.size > MOST_ROTATIONS:
            return self._stacked_apart(positions_BT, turning)
        offsets = mx.array(places_BTG.reshape(-1).astype(np.int32))
        shape = (rows * count * (turning + still), 1, 1, self._dims)
        return Rotation(
            lambda x_BTGC: self._fused(x_BTGC.reshape(shape), offsets).reshape(x_BTGC.shape)
        )

    def _stacked_apart(self, positions_BT: NDArray[np.int64], turning: int) -> Rotation:
        offsets = mx.array(positions_BT.reshape(-1).astype(np.int32))

        def rotate(x_BTGC: mx.array) -> mx.array:
            flat_NG1C = x_BTGC.reshape(offsets.shape[0], -1, 1, self._dims)
            turned = self._fused(flat_NG1C, offsets)[:, :turning]
            return mx.concatenate([turned, flat_NG1C[:, turning:]], axis=1).reshape(x_BTGC.shape)

        return Rotation(rotate)

    def _by_table(self, positions: NDArray[np.int64]) -> Rotation:
        flat, shape = positions.reshape(-1), (*positions.shape, self._dims // 2)
        cos, sin, less_one = (
            mx.array(table.astype(np.float32).reshape(shape))
            for table in (*self._table.cos_sin(flat), self._table.cos_less_one(flat))
        )
        return Rotation(lambda x: _turned(x, cos, sin), sin, less_one)

    def _fused(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self._dims,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )


def _turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
