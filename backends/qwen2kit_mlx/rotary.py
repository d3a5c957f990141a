"""Rotary position embedding of queries and keys, from the spec's float64 frequency table.

Float32 takes exact cosines and sines: ``mx.fast.rope`` forms the angle in float32 and is off by
1e-4 at position 2,000 and by 3e-3 at 32,000. In 16-bit dtypes that is below the rounding of the
values themselves, so there the fused kernel is used.

YaRN's attention factor scales rotated queries and keys alike, which is one factor on their
product: it is applied as `score_scale` and never touches the tensors.

Attention does not change when one vector is taken from all keys, since it moves all scores of a
query alike. Qwen2's key biases reach 200 in dimensions that hardly turn. In float32 keys stand less
their unrotated bias, their anchor, which leaves the digits to what differs among them.

An exact rotation is one elementwise expression of the two halves of every head, each broadcast
against what it adds to both halves of the result, so that it can be compiled into one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.rope import RoPETable, rope_table

MOST_ROTATIONS = 1 << 15  # by their own offsets in one operation; a GPU's grid ends at 2**16

Halves = tuple[mx.array, mx.array]
"""First and second half ``[..., 1, C / 2]`` of vectors ``[..., C]``; see `halves`."""


class Rotation(Protocol):
    """A rotation of heads."""

    def __call__(self, x: mx.array, anchor: Halves | None = None) -> mx.array:
        """``x`` rotated, and what that adds to a vector that is the same at every position.

        Args:
            x: heads, as the method of `Rotary` that made this takes them.
            anchor: the vector of every head, zero for those without; in float32 alone. Its shape
                without the last two axes broadcasts to that of ``x`` without the last.
        """
        ...


class Rotary:
    """Rotations of one model.

    Args:
        spec: the model.
        dtype: of what is rotated.
        fuse: compile exact rotations into one kernel each.

    Attributes:
        score_scale: factor of the attention scores, ``attention_factor**2 / sqrt(head_dim)``.
    """

    def __init__(self, spec: ModelSpec, dtype: mx.Dtype, *, fuse: bool = False) -> None:
        table = rope_table(spec)
        self.score_scale = table.attention_factor**2 / spec.head_dim**0.5
        self._dims = spec.head_dim
        self._table = RoPETable(table.inv_freq, 1.0)
        self._exact = dtype == mx.float32
        self._turned = mx.compile(_turned, shapeless=True) if fuse else _turned
        self._periods = mx.array([1.0 / w for w in table.inv_freq], dtype=mx.float32)

    def at(self, start: int, count: int) -> Rotation:
        """The rotation of ``[B, heads, count, head_dim]`` at ``count`` positions from ``start``."""
        if self._exact:
            return self._by_table(*self._tables(np.arange(start, start + count)))
        return _plain(lambda x_BHTC: self._rounded(x_BHTC, start))

    def scattered(self, positions_T: NDArray[np.int64]) -> Rotation:
        """The rotation of ``[1, heads, T, head_dim]`` at any T positions."""
        if self._exact:
            return self._by_table(*self._tables(positions_T))
        offsets = mx.array(positions_T.astype(np.int32))

        def rotate(x_1HTC: mx.array) -> mx.array:
            return self._rounded(x_1HTC.transpose(2, 1, 0, 3), offsets).transpose(2, 1, 0, 3)

        return _plain(rotate)

    def stacked(self, positions_BT: NDArray[np.int64], turning: int, still: int) -> Rotation:
        """The rotation of ``[B, T, turning + still, head_dim]``, in which the last ``still``
        heads (values) stay as they are: a rotation by position 0, one operation for all."""
        rows, count = positions_BT.shape
        if self._exact:
            turn, drift = self._tables(positions_BT[:, :, None])
            parts = ((turn, turning), (mx.array(_STILL), still))
            by_head = [
                mx.broadcast_to(part, (2, rows, count, heads, *turn.shape[-2:]))
                for part, heads in parts
            ]
            return self._by_table(mx.concatenate(by_head, axis=3), drift)
        places_BTG = np.repeat(positions_BT[:, :, None], turning + still, axis=-1)
        places_BTG[:, :, turning:] = 0
        if places_BTG.size > MOST_ROTATIONS:
            return self._stacked_apart(positions_BT, turning)
        offsets = mx.array(places_BTG.reshape(-1).astype(np.int32))
        shape = (rows * count * (turning + still), 1, 1, self._dims)
        return _plain(
            lambda x_BTGC: self._rounded(x_BTGC.reshape(shape), offsets).reshape(x_BTGC.shape)
        )

    def _stacked_apart(self, positions_BT: NDArray[np.int64], turning: int) -> Rotation:
        offsets = mx.array(positions_BT.reshape(-1).astype(np.int32))

        def rotate(x_BTGC: mx.array) -> mx.array:
            flat_NG1C = x_BTGC.reshape(offsets.shape[0], -1, 1, self._dims)
            turned = self._rounded(flat_NG1C, offsets)[:, :turning]
            return mx.concatenate([turned, flat_NG1C[:, turning:]], axis=1).reshape(x_BTGC.shape)

        return _plain(rotate)

    def _tables(self, positions: NDArray[np.int64]) -> tuple[mx.array, mx.array]:
        """Float32 ``[2, *positions.shape, 2, C / 2]``: what either half of a vector (first axis)
        adds to both halves of the rotated one, and the same less the vector itself."""
        flat = positions.reshape(-1)
        (cos, sin), less_one = self._table.cos_sin(flat), self._table.cos_less_one(flat)
        shape = (2, *positions.shape, 2, self._dims // 2)
        turn, drift = (
            mx.array(np.array([[c, sin], [-sin, c]], np.float32).swapaxes(1, 2).reshape(shape))
            for c in (cos, less_one)
        )
        return turn, drift

    def _by_table(self, turn: mx.array, drift: mx.array) -> Rotation:
        turns, drifts = (
            [half.squeeze(0) for half in mx.split(table, 2)] for table in (turn, drift)
        )

        def rotate(x: mx.array, anchor: Halves | None = None) -> mx.array:
            added = () if anchor is None else (*anchor, *drifts)
            return mx.flatten(self._turned(*halves(x), *turns, *added), -2)

        return rotate

    def _rounded(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self._dims,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )


_STILL = np.eye(2, dtype=np.float32)[:, None, None, None, :, None]
"""`Rotary._tables` of position 0, for any head size: each half is itself."""


def halves(x: mx.array) -> Halves:
    """Views of ``x`` ``[..., C]``."""
    first, second = mx.split(mx.unflatten(x, -1, (2, -1)), 2, axis=-2)
    return first, second


def _turned(
    first: mx.array, second: mx.array, by_first: mx.array, by_second: mx.array, *more: mx.array
) -> mx.array:
    """``[..., 2, C / 2]``: the sum of what the halves add, of as many vectors as are given."""
    turned = first * by_first + second * by_second
    return turned + _turned(*more) if more else turned


def _plain(turn: Callable[[mx.array], mx.array]) -> Rotation:
    """A rotation that knows no anchors."""

    def rotate(x: mx.array, anchor: Halves | None = None) -> mx.array:
        assert anchor is None
        return turn(x)

    return rotate
