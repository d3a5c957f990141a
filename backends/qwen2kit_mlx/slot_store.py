"""Keys and values of many sequences, one row each, where column number equals token position.

Rows are of different length. What lies beyond a row's length is undefined: the next tokens of
that row overwrite it before anything may see it, so that cutting a row back costs nothing.

Shape suffixes: R rows, B rows of one pass, K kv heads, T new tokens, S columns, C head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen2kit.spec.model import ModelSpec

BLOCK = 256  # columns by which the arrays grow


@dataclass(frozen=True, slots=True)
class Place:
    """Where the ``count`` tokens of each of B consecutive rows go.

    Attributes:
        first: the first row.
        starts: position of the first token, one per row.
        count: tokens per row.
        index: row and column numbers ``[B, 1]`` and ``[B, count]`` on the device where rows
            start at different positions, else None.
    """

    first: int
    starts: tuple[int, ...]
    count: int
    index: tuple[mx.array, mx.array] | None

    @classmethod
    def at(cls, first: int, starts: Sequence[int], count: int) -> Place:
        """The place; index arrays are made once and serve all layers."""
        index = None
        if len(set(starts)) > 1:
            rows = np.arange(first, first + len(starts), dtype=np.int32)[:, None]
            columns = np.array(starts, dtype=np.int32)[:, None] + np.arange(count, dtype=np.int32)
            index = mx.array(rows), mx.array(columns)
        return cls(first, tuple(starts), count, index)

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + len(self.starts))

    @property
    def end(self) -> int:
        """Column after the last one that is written."""
        return max(self.starts) + self.count


class SlotStore:
    """Keys and values of all layers; memory is taken as rows get longer.

    Args:
        spec: the model.
        rows: R.
        dtype: what is stored.
    """

    def __init__(self, spec: ModelSpec, rows: int, dtype: mx.Dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self._heads, self._width = spec.num_key_value_heads, spec.head_dim
        empty = mx.zeros((rows, self._heads, 0, self._width), dtype=dtype)
        self._keys = [empty] * spec.num_hidden_layers
        self._values = [empty] * spec.num_hidden_layers

    def reserve(self, end: int) -> None:
        """Make room for columns below ``end`` in every row."""
        missing = -(-end // BLOCK) * BLOCK - self._keys[0].shape[2]
        if missing <= 0:
            return
        more = mx.zeros((self.rows, self._heads, missing, self._width), dtype=self.dtype)
        for arrays in (self._keys, self._values):
            for layer, array in enumerate(arrays):
                arrays[layer] = mx.concatenate([array, more], axis=2)

    def write(
        self, layer: int, place: Place, keys_BKTC: mx.array, values_BKTC: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Store new entries; room has been reserved.

        Returns:
            Keys and values ``[B, K, S, C]`` of the place's rows up to its end.
        """
        keys, values = self._keys[layer], self._values[layer]
        for array, new in ((keys, keys_BKTC), (values, values_BKTC)):
            if place.index is None:
                start = place.starts[0]
                array[place.rows, :, start : start + place.count] = new
            else:
                rows, columns = place.index
                array[rows, :, columns] = new.transpose(0, 2, 1, 3)
        return keys[place.rows, :, : place.end], values[place.rows, :, : place.end]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` columns of row ``target`` those of row ``source``."""
        pieces = [mx.contiguous(array[source, :, :length]) for array in self.arrays()]
        mx.eval(pieces)  # a pending read of the source would make the update copy the whole array
        for array, piece in zip(self.arrays(), pieces, strict=True):
            array[target, :, :length] = piece

    def permute(self, order: Sequence[int]) -> None:
        """Let row ``i`` be what row ``order[i]`` was, one layer in transit at a time."""
        index = mx.array(list(order))
        for arrays in (self._keys, self._values):
            for layer, array in enumerate(arrays):
                arrays[layer] = array[index]
                mx.eval(arrays[layer])

    def columns(self, layer: int, row: int, length: int) -> tuple[mx.array, mx.array]:
        """Keys and values ``[K, length, C]`` of one row."""
        return self._keys[layer][row, :, :length], self._values[layer][row, :, :length]

    def fill(self, layer: int, row: int, keys_KSC: mx.array, values_KSC: mx.array) -> None:
        """Store the first S columns of one row."""
        length = keys_KSC.shape[1]
        self._keys[layer][row, :, :length] = keys_KSC
        self._values[layer][row, :, :length] = values_KSC

    def drop(self) -> None:
        """Forget everything, so that the memory can be reused."""
        empty = mx.zeros((0,), dtype=self.dtype)
        self._keys = [empty] * len(self._keys)
        self._values = [empty] * len(self._values)

    def arrays(self) -> list[mx.array]:
        """Everything stored."""
        return [*self._keys, *self._values]
