"""Keys and values of many sequences in all layers."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.columns import BLOCK, Columns, DenseColumns
from qwen2kit_mlx.packed_columns import PackedColumns, group_size


class SlotStore:
    """One `Columns` per layer.

    Args:
        spec: the model.
        rows: sequences.
        dtype: compute dtype.
        bits: how many to keep keys and values in; None keeps them as computed.

    Attributes:
        layers: keys and values by layer.
        room: columns there is room for.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, dtype: mx.Dtype, bits: int | None = None
    ) -> None:
        self.room = 0
        self.layers = [_columns(spec, rows, dtype, bits) for _ in range(spec.num_hidden_layers)]

    def reserve(self, end: int) -> None:
        """Make room for positions below ``end`` in every row."""
        if end > self.room:
            self.room = -(-end // BLOCK) * BLOCK
            for layer in self.layers:
                layer.reserve(self.room)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` positions of row ``target`` those of row ``source``."""
        for layer in self.layers:
            layer.copy(source, target, length)

    def permute(self, order: Sequence[int]) -> None:
        """Let row ``i`` be what row ``order[i]`` was, one layer in transit at a time."""
        index = mx.array(list(order))
        for layer in self.layers:
            layer.permute(index)

    def keep(self, columns: Sequence[int]) -> None:
        """Make these columns the first ones, in every row; the others are undefined after that."""
        index = mx.array([*columns, *(0,) * (self.room - len(columns))], dtype=mx.int32)
        for layer in self.layers:
            layer.keep(index)

    def drop(self) -> None:
        """Forget everything, so that the memory can be reused."""
        self.layers = []

    def arrays(self) -> list[mx.array]:
        """Everything stored."""
        return [array for layer in self.layers for array in layer.arrays()]


def _columns(spec: ModelSpec, rows: int, dtype: mx.Dtype, bits: int | None) -> Columns:
    shape = rows, spec.num_key_value_heads, spec.head_dim
    group = group_size(spec.head_dim)
    if bits is None or group is None:
        return DenseColumns(*shape, dtype)
    return PackedColumns(*shape, dtype, bits, group)
