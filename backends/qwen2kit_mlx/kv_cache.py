"""Keys and values of a batch, where slot number equals token position in every row.

Rows may have different lengths: padding a prefill on the right leaves garbage beyond a row's
length, which the next tokens of that row overwrite before anything can see it. Cutting a row back
is therefore nothing but a smaller length.

Shape suffixes: B rows, K kv heads, T new tokens, S slots, C head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec

BLOCK = 256


class KVCache:
    """Cache of all layers of one batch.

    Attributes:
        lengths: valid positions per row.
    """

    def __init__(self, spec: ModelSpec, rows: int, dtype: mx.Dtype) -> None:
        self.lengths = [0] * rows
        self._shape = (spec.num_key_value_heads, spec.head_dim)
        self._dtype = dtype
        self._keys: list[mx.array | None] = [None] * spec.num_hidden_layers
        self._values: list[mx.array | None] = [None] * spec.num_hidden_layers

    @property
    def start(self) -> int | list[int]:
        """Where the next token of every row goes: one number if it is the same for all."""
        first = self.lengths[0]
        return first if all(n == first for n in self.lengths) else list(self.lengths)

    def write(
        self, layer: int, keys_BKTC: mx.array, values_BKTC: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Store new entries after each row's length; `advance` afterwards, once for all layers.

        Rows of different length take one token at a time (T = 1).

        Returns:
            Keys and values of all slots up to the longest row's new end.
        """
        count, end = keys_BKTC.shape[2], max(self.lengths) + keys_BKTC.shape[2]
        keys = _grown(self._keys[layer], self._room(end), self._dtype, end)
        values = _grown(self._values[layer], self._room(end), self._dtype, end)
        start = self.start
        if isinstance(start, int):
            keys[:, :, start : start + count] = keys_BKTC
            values[:, :, start : start + count] = values_BKTC
        else:
            rows, slots = mx.arange(len(start)), mx.array(start)
            keys[rows, :, slots] = keys_BKTC[:, :, 0]
            values[rows, :, slots] = values_BKTC[:, :, 0]
        self._keys[layer], self._values[layer] = keys, values
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count ``count`` written tokens in every row as valid."""
        self.lengths = [n + count for n in self.lengths]

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions of every row."""
        self.lengths = [min(n, length) for n in self.lengths]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = mx.array(list(rows))
        self.lengths = [self.lengths[row] for row in rows]
        self._keys = [None if k is None else k[index] for k in self._keys]
        self._values = [None if v is None else v[index] for v in self._values]

    def drop(self) -> None:
        """Forget everything, so that the memory can be reused."""
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)

    def arrays(self) -> list[mx.array]:
        """Everything stored, to be evaluated between prefill chunks."""
        return [a for a in (*self._keys, *self._values) if a is not None]

    def _room(self, end: int) -> tuple[int, int, int, int]:
        slots = -(-end // BLOCK) * BLOCK
        return (len(self.lengths), self._shape[0], slots, self._shape[1])


def _grown(
    stored: mx.array | None, shape: tuple[int, int, int, int], dtype: mx.Dtype, end: int
) -> mx.array:
    """``stored`` with room for ``end`` slots; ``shape`` is what a new array would have."""
    if stored is None:
        return mx.zeros(shape, dtype=dtype)
    have = stored.shape[2]
    if have >= end:
        return stored
    rows, heads, slots, width = shape
    return mx.concatenate(
        [stored, mx.zeros((rows, heads, slots - have, width), dtype=dtype)], axis=2
    )
