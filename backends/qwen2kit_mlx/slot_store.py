"""Keys and values of many sequences in all layers.

Where rows may become much longer than the model's sliding window, layers that have one forget: they
keep the window, and column 0 stands for a later position, the row's base. Columns stay in order and
without gaps, so that attention needs nothing but shifted positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.columns import BLOCK, Columns, DenseColumns
from qwen2kit_mlx.packed_columns import PackedColumns, group_size

SPARE = 64  # positions before the window that stay, so that a row can be cut back a little


class SlotStore:
    """One `Columns` per layer.

    Args:
        spec: the model.
        rows: sequences.
        dtype: compute dtype.
        bits: how many to keep keys and values in; None keeps them as computed.
        capacity: longest row there will be, to decide whether layers may forget; None forbids it.

    Attributes:
        layers: keys and values by layer.
        windows: sliding-window length of every layer, or None.
        forgets: whether any layer may.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rows: int,
        dtype: mx.Dtype,
        bits: int | None = None,
        capacity: int | None = None,
    ) -> None:
        self.layers = [_columns(spec, rows, dtype, bits) for _ in range(spec.num_hidden_layers)]
        self.windows = [spec.window_of(layer) for layer in range(spec.num_hidden_layers)]
        self._room: dict[int | None, int] = dict.fromkeys(self.windows, 0)
        self._window = next((window for window in self.windows if window is not None), 0)
        self._kept = self._window + SPARE + BLOCK
        self.forgets = bool(self._window and capacity and capacity > self._kept)
        self._base = [0] * rows

    def base(self, window: int | None, row: int) -> int:
        """The position of a row's column 0 in layers with this window."""
        return 0 if window is None else self._base[row]

    def room(self, window: int | None) -> int:
        """Columns there is room for in layers with this window."""
        return self._room[window]

    def reserve(self, window: int | None, end: int) -> None:
        """Make room for columns below ``end`` in layers with this window."""
        if end <= self._room[window]:
            return
        self._room[window] = -(-end // BLOCK) * BLOCK
        for layer, own in zip(self.layers, self.windows, strict=True):
            if own == window:
                layer.reserve(self._room[window])

    def slide(self, row: int, start: int, count: int) -> None:
        """Forget what the next ``count`` tokens, from ``start`` on, do not see, if that is much."""
        base = self._base[row]
        if not self.forgets or start + count - base <= self._kept:
            return
        by = start - self._window + 1 - SPARE - base
        if by > 0:
            for layer in self._windowed():
                layer.copy(row, row, by, start - base - by)
            self._base[row] = base + by

    def holds(self, row: int, length: int) -> bool:
        """Whether a row cut back to ``length`` has all that its next token sees."""
        base = self._base[row]
        return not base or length - self._window + 1 >= base

    def forget(self, row: int) -> None:
        """The row is empty now."""
        self._base[row] = 0

    def clear(self, row: int) -> None:
        """Make a row empty, and zero."""
        self.forget(row)
        for layer in self.layers:
            layer.clear(row)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` positions of row ``target`` those of row ``source``."""
        self._base[target] = self._base[source]
        for layer, window in zip(self.layers, self.windows, strict=True):
            columns = length - self.base(window, source)
            if columns > 0:
                layer.copy(source, target, 0, columns)

    def permute(self, order: Sequence[int]) -> None:
        """Let row ``i`` be what row ``order[i]`` was, one layer in transit at a time."""
        index = mx.array(list(order))
        for layer in self.layers:
            layer.permute(index)
        self._base = [self._base[row] for row in order]

    def keep(self, columns: Sequence[int]) -> None:
        """Make these columns the first ones, in every row; the others are undefined after that.
        For stores that forget nothing."""
        for layer, window in zip(self.layers, self.windows, strict=True):
            room = self._room[window]
            layer.keep(mx.array([*columns, *(0,) * (room - len(columns))], dtype=mx.int32))

    def drop(self) -> None:
        """Forget everything, so that the memory can be reused."""
        self.layers = []

    def arrays(self) -> list[mx.array]:
        """Everything stored."""
        return [array for layer in self.layers for array in layer.arrays()]

    def _windowed(self) -> list[Columns]:
        return [
            layer
            for layer, window in zip(self.layers, self.windows, strict=True)
            if window is not None
        ]


def _columns(spec: ModelSpec, rows: int, dtype: mx.Dtype, bits: int | None) -> Columns:
    shape = rows, spec.num_key_value_heads, spec.head_dim
    group = group_size(spec.head_dim)
    if bits is None or group is None:
        return DenseColumns(*shape, dtype)
    return PackedColumns(*shape, dtype, bits, group)
