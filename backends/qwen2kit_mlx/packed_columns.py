"""Keys and values kept in 4 or 8 bits: affine groups along the head, as MLX quantises weights.

Few queries multiply with the packed numbers as they are; for many (prefill) the layer's columns
are unpacked for the time of one product.

Shape suffixes as in `columns`; M = queries per kv head, H / K * T.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from qwen2kit_mlx.columns import Place, duplicate, grown, update
from qwen2kit_mlx.kernels import Kernels, Mask
from qwen2kit_mlx.visibility import View

CACHE_BITS = (4, 8)
GROUP_SIZES = (64, 32)
_NAMES = (
    ("keys", "keys.scales", "keys.biases"),
    ("values", "values.scales", "values.biases"),
)
FEW = 16  # queries per row that are multiplied with packed numbers


def group_size(head_dim: int) -> int | None:
    """Group length for heads of this size; None if they cannot be quantised."""
    return next((size for size in GROUP_SIZES if head_dim % size == 0), None)


class Packed(NamedTuple):
    """Packed integers ``[..., C * bits / 32]`` uint32, scales and biases ``[..., C / group]``."""

    integers: mx.array
    scales: mx.array
    biases: mx.array


class PackedColumns:
    """`qwen2kit_mlx.columns.Columns` in ``bits`` bits.

    Args:
        rows: R.
        heads: K.
        width: C, a multiple of ``group``.
        dtype: compute dtype.
        bits: 4 or 8.
        group: numbers that share a scale.
    """

    def __init__(
        self, rows: int, heads: int, width: int, dtype: mx.Dtype, bits: int, group: int
    ) -> None:
        self._bits, self._group, self._dtype = bits, group, dtype
        shape = (2, rows, heads, 0)
        self._stored = Packed(
            mx.zeros((*shape, width * bits // 32), dtype=mx.uint32),
            mx.zeros((*shape, width // group), dtype=dtype),
            mx.zeros((*shape, width // group), dtype=dtype),
        )

    def reserve(self, end: int) -> None:
        """See `Columns.reserve`."""
        self._stored = Packed(*(grown(part, end) for part in self._stored))

    def write(self, place: Place, stacked_BT2KC: mx.array) -> None:
        """See `Columns.write`."""
        for part, new in zip(self._stored, self._quantized(stacked_BT2KC), strict=True):
            update(part, place, new)

    def write_row(self, row: int, start: int, keys_KTC: mx.array, values_KTC: mx.array) -> None:
        """See `Columns.write_row`."""
        new = self._quantized(mx.stack([keys_KTC, values_KTC]))
        for part, packed in zip(self._stored, new, strict=True):
            part[:, row, :, start : start + keys_KTC.shape[1]] = packed

    def read(self, rows: slice, first: int, end: int) -> tuple[mx.array, mx.array]:
        """See `Columns.read`."""
        keys, values = (
            mx.dequantize(*part, group_size=self._group, bits=self._bits)
            for part in self._parts(rows, first, end)
        )
        return keys, values

    def attention(
        self, kernels: Kernels, q_BHTC: mx.array, rows: slice, end: int, seen: View, scale: float
    ) -> mx.array:
        """See `Columns.attention`."""
        if q_BHTC.shape[2] > FEW or not kernels.lazy:
            keys, values = self.read(rows, seen.first, end)
            return kernels.attention(q_BHTC, keys, values, scale, seen.mask)
        batch, heads, count, width = q_BHTC.shape
        keys_BKS, values_BKS = self._parts(rows, seen.first, end)
        shared = keys_BKS.scales.shape[1]
        q_BKMC = q_BHTC.reshape(batch, shared, -1, width) * scale
        scores_BKMS = self._product(q_BKMC, keys_BKS, transpose=True)
        scores_BKGTS = scores_BKMS.reshape(batch, shared, -1, count, scores_BKMS.shape[-1])
        shown = _masked(scores_BKGTS, seen.mask).reshape(scores_BKMS.shape)
        weights_BKMS = mx.softmax(shown, axis=-1, precise=True)
        out_BKMC = self._product(weights_BKMS, values_BKS, transpose=False)
        return out_BKMC.reshape(batch, heads, count, width)

    def copy(self, source: int, target: int, first: int, count: int) -> None:
        """See `Columns.copy`."""
        for part in self._stored:
            duplicate(part, source, target, first, count)

    def clear(self, row: int) -> None:
        """See `Columns.clear`."""
        for part in self._stored:
            part[:, row] = 0

    def permute(self, order: mx.array) -> None:
        """See `Columns.permute`."""
        self._stored = Packed(*(part[:, order] for part in self._stored))
        mx.eval(self._stored)

    def keep(self, columns: mx.array) -> None:
        """See `Columns.keep`."""
        self._stored = Packed(*(part[:, :, :, columns] for part in self._stored))

    def export(self, row: int, length: int) -> dict[str, mx.array]:
        """See `Columns.export`."""
        return {
            name: part[side, row, :, :length]
            for side, names in enumerate(_NAMES)
            for name, part in zip(names, self._stored, strict=True)
        }

    def restore(self, row: int, parts: dict[str, mx.array]) -> None:
        """See `Columns.restore`."""
        for side, names in enumerate(_NAMES):
            for name, part in zip(names, self._stored, strict=True):
                part[side, row, :, : parts[name].shape[1]] = parts[name]

    def arrays(self) -> tuple[mx.array, ...]:
        """See `Columns.arrays`."""
        return self._stored

    def _quantized(self, values: mx.array) -> Packed:
        return Packed(*mx.quantize(values, group_size=self._group, bits=self._bits))

    def _parts(self, rows: slice, first: int, end: int) -> tuple[Packed, Packed]:
        keys = Packed(*(part[0, rows, :, first:end] for part in self._stored))
        return keys, Packed(*(part[1, rows, :, first:end] for part in self._stored))

    def _product(self, x: mx.array, packed: Packed, *, transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            x, *packed, transpose=transpose, group_size=self._group, bits=self._bits
        )


def _masked(scores_BKGTS: mx.array, mask: Mask) -> mx.array:
    """Scores under a mask that broadcasts to ``[B, 1, T, S]`` (see `Kernels.attention`)."""
    if mask is None:
        return scores_BKGTS
    if isinstance(mask, str):
        count, columns = scores_BKGTS.shape[-2:]
        own = np.arange(columns - count, columns)[:, None]
        mask = mx.array(np.arange(columns) <= own)[None, None]
    mask = mask[:, :, None]
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores_BKGTS, -mx.inf)
    return scores_BKGTS + mask
