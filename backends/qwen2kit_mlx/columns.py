"""Keys and values of one layer: rows are sequences, column number equals token position.

Rows are of different length. What lies beyond a row's length is undefined: the next tokens of
that row overwrite it before anything may see it, so that cutting a row back costs nothing.

Shape suffixes: R rows, B rows of one pass, K kv heads, T new tokens, S columns, C head size; 2
stands for keys, then values, which share an array so that one operation updates both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

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
    def start(self) -> int:
        """Position of the first token where all rows have the same."""
        return self.starts[0]

    @property
    def end(self) -> int:
        """Column after the last one that is written."""
        return max(self.starts) + self.count

    @property
    def positions(self) -> mx.array:
        """int32 ``[B, count]`` or, where rows do not differ, ``[1, count]``."""
        if self.index is not None:
            return self.index[1]
        return mx.arange(self.start, self.end, dtype=mx.int32)[None]


class DenseColumns:
    """Stored as computed; memory is taken as rows get longer."""

    def __init__(self, rows: int, heads: int, width: int, dtype: mx.Dtype) -> None:
        self._shape, self._dtype = (rows, heads, width), dtype
        self._stored = mx.zeros((2, rows, heads, 0, width), dtype=dtype)

    def reserve(self, end: int) -> None:
        """Make room for columns below ``end`` in every row."""
        rows, heads, width = self._shape
        missing = end - self._stored.shape[3]
        more = mx.zeros((2, rows, heads, missing, width), dtype=self._dtype)
        self._stored = mx.concatenate([self._stored, more], axis=3)

    def write(self, place: Place, stacked_BT2KC: mx.array) -> None:
        """Store new entries; room has been reserved."""
        if place.index is None:
            new_2BKTC = stacked_BT2KC.transpose(2, 0, 3, 1, 4)
            self._stored[:, place.rows, :, place.start : place.end] = new_2BKTC
        else:
            rows, columns = place.index
            self._stored[:, rows, :, columns] = stacked_BT2KC

    def write_row(self, row: int, start: int, keys_KTC: mx.array, values_KTC: mx.array) -> None:
        """Store T columns of one row from ``start`` on; room has been reserved."""
        end = start + keys_KTC.shape[1]
        self._stored[0, row, :, start:end] = keys_KTC
        self._stored[1, row, :, start:end] = values_KTC

    def read(self, rows: slice, end: int) -> tuple[mx.array, mx.array]:
        """Keys and values ``[B, K, end, C]``."""
        return self._stored[0, rows, :, :end], self._stored[1, rows, :, :end]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` columns of row ``target`` those of row ``source``."""
        piece = mx.contiguous(self._stored[:, source, :, :length])
        mx.eval(piece)  # with a read of the source pending, the update would copy everything
        self._stored[:, target, :, :length] = piece

    def permute(self, order: mx.array) -> None:
        """Let row ``i`` be what row ``order[i]`` was."""
        self._stored = self._stored[:, order]
        mx.eval(self._stored)

    def keep(self, columns: mx.array) -> None:
        """Let column ``i`` be what column ``columns[i]`` was."""
        self._stored = self._stored[:, :, :, columns]

    def arrays(self) -> tuple[mx.array, ...]:
        """Everything stored."""
        return (self._stored,)
