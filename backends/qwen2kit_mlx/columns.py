"""Keys and values of one layer: rows are sequences, columns follow the positions of their tokens.

Rows are of different length. What lies beyond a row's length is undefined: the next tokens of
that row overwrite it before anything may see it, so that cutting a row back costs nothing.

Shape suffixes: R rows, B rows of one pass, K kv heads, T new tokens, S columns, C head size; 2
stands for keys, then values, which share an array so that one operation updates both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.visibility import View

BLOCK = 256  # columns by which the arrays grow


@dataclass(frozen=True, slots=True)
class Place:
    """The columns into which the ``count`` tokens of each of B consecutive rows go.

    Attributes:
        first: the first row.
        starts: column of the first token, one per row.
        count: tokens per row.
        index: ``[B, count, 2, K]`` numbers on the device along each of the first four axes of
            what is stored, where rows start at different columns, else None. A slice among them
            would become numbers on the device anew for every layer.
    """

    first: int
    starts: tuple[int, ...]
    count: int
    index: tuple[mx.array, ...] | None

    @classmethod
    def at(cls, first: int, starts: Sequence[int], count: int, heads: int) -> Place:
        """The place, in columns of ``heads`` kv heads; index arrays are made once and serve all
        layers."""
        index = None
        if len(set(starts)) > 1:
            columns_BT = np.array(starts)[:, None] + np.arange(count)
            numbers = np.ix_(range(len(starts)), range(count), range(2), range(heads))
            axes = numbers[2], first + numbers[0], numbers[3], columns_BT[:, :, None, None]
            index = tuple(mx.array(a.astype(np.int32)) for a in np.broadcast_arrays(*axes))
        return cls(first, tuple(starts), count, index)

    @property
    def columns(self) -> mx.array:
        """Columns ``[B, count]`` of the tokens, where rows start at different ones."""
        assert self.index is not None
        return self.index[-1][:, :, 0, 0]

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + len(self.starts))

    @property
    def start(self) -> int:
        """Column of the first token where all rows have the same."""
        return self.starts[0]

    @property
    def end(self) -> int:
        """Column after the last one that is written."""
        return max(self.starts) + self.count


class Columns(Protocol):
    """Keys and values of one layer; the arrays begin with ``[2, R, K, S]``."""

    def reserve(self, end: int) -> None:
        """Make room for columns below ``end`` in every row; more than there is."""
        ...

    def write(self, place: Place, stacked_BT2KC: mx.array) -> None:
        """Store new entries; room has been reserved."""
        ...

    def write_row(self, row: int, start: int, keys_KTC: mx.array, values_KTC: mx.array) -> None:
        """Store T columns of one row from ``start`` on; room has been reserved."""
        ...

    def read(self, rows: slice, first: int, end: int) -> tuple[mx.array, mx.array]:
        """Keys and values ``[B, K, end - first, C]`` in the compute dtype."""
        ...

    def attention(
        self, kernels: Kernels, q_BHTC: mx.array, rows: slice, end: int, seen: View, scale: float
    ) -> mx.array:
        """``[B, H, T, C]`` over columns ``seen.first`` to ``end``."""
        ...

    def copy(self, source: int, target: int, first: int, count: int) -> None:
        """Make the first ``count`` columns of row ``target`` those from ``first`` on of row
        ``source``, which may be the same."""
        ...

    def clear(self, row: int) -> None:
        """Make all columns of a row zero."""
        ...

    def permute(self, order: mx.array) -> None:
        """Let row ``i`` be what row ``order[i]`` was."""
        ...

    def keep(self, columns: mx.array) -> None:
        """Let column ``i`` be what column ``columns[i]`` was."""
        ...

    def export(self, row: int, length: int) -> dict[str, mx.array]:
        """The first columns of a row, ``[K, length, *]`` each, to the bit."""
        ...

    def restore(self, row: int, parts: dict[str, mx.array]) -> None:
        """Put back what `export` gave; room has been reserved."""
        ...

    def arrays(self) -> tuple[mx.array, ...]:
        """Everything stored."""
        ...


class DenseColumns:
    """`Columns` stored as computed."""

    def __init__(self, rows: int, heads: int, width: int, dtype: mx.Dtype) -> None:
        self._shape, self._dtype = (rows, heads, width), dtype
        self._stored = mx.zeros((2, rows, heads, 0, width), dtype=dtype)

    def reserve(self, end: int) -> None:
        """See `Columns.reserve`."""
        self._stored = grown(self._stored, end)

    def write(self, place: Place, stacked_BT2KC: mx.array) -> None:
        """See `Columns.write`."""
        update(self._stored, place, stacked_BT2KC)

    def write_row(self, row: int, start: int, keys_KTC: mx.array, values_KTC: mx.array) -> None:
        """See `Columns.write_row`."""
        end = start + keys_KTC.shape[1]
        self._stored[0, row, :, start:end] = keys_KTC
        self._stored[1, row, :, start:end] = values_KTC

    def read(self, rows: slice, first: int, end: int) -> tuple[mx.array, mx.array]:
        """See `Columns.read`."""
        return self._stored[0, rows, :, first:end], self._stored[1, rows, :, first:end]

    def attention(
        self, kernels: Kernels, q_BHTC: mx.array, rows: slice, end: int, seen: View, scale: float
    ) -> mx.array:
        """See `Columns.attention`."""
        keys, values = self.read(rows, seen.first, end)
        return kernels.attention(q_BHTC, keys, values, scale, seen.mask)

    def copy(self, source: int, target: int, first: int, count: int) -> None:
        """See `Columns.copy`."""
        duplicate(self._stored, source, target, first, count)

    def clear(self, row: int) -> None:
        """See `Columns.clear`."""
        self._stored[:, row] = 0

    def permute(self, order: mx.array) -> None:
        """See `Columns.permute`."""
        self._stored = self._stored[:, order]
        mx.eval(self._stored)

    def keep(self, columns: mx.array) -> None:
        """See `Columns.keep`."""
        self._stored = self._stored[:, :, :, columns]

    def export(self, row: int, length: int) -> dict[str, mx.array]:
        """See `Columns.export`."""
        keys, values = self._stored[:, row, :, :length]
        return {"keys": keys, "values": values}

    def restore(self, row: int, parts: dict[str, mx.array]) -> None:
        """See `Columns.restore`."""
        self.write_row(row, 0, parts["keys"], parts["values"])

    def arrays(self) -> tuple[mx.array, ...]:
        """See `Columns.arrays`."""
        return (self._stored,)


def grown(stored: mx.array, end: int) -> mx.array:
    """``stored`` ``[2, R, K, S, *]`` with ``end`` columns."""
    both, rows, heads, have, width = stored.shape
    more = mx.zeros((both, rows, heads, end - have, width), dtype=stored.dtype)
    return mx.concatenate([stored, more], axis=3)


def update(stored: mx.array, place: Place, new_BT2KC: mx.array) -> None:
    """Write into ``stored`` ``[2, R, K, S, *]`` in place."""
    if place.index is None:
        stored[:, place.rows, :, place.start : place.end] = new_BT2KC.transpose(2, 0, 3, 1, 4)
    else:
        stored[place.index] = new_BT2KC


def duplicate(stored: mx.array, source: int, target: int, first: int, count: int) -> None:
    """`Columns.copy` for ``stored`` ``[2, R, K, S, *]``, in place."""
    piece = mx.contiguous(stored[:, source, :, first : first + count])
    mx.eval(piece)  # with a read of the source pending, the update would copy everything
    stored[:, target, :, :count] = piece
