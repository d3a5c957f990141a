"""How the tokens of one forward pass see each other and what came before.

The decoder hands over the stacked queries, keys and values of a layer and gets attention's
output; positions, caches and masks are decided here.

Shape suffixes: B rows, T tokens, G stacked heads (H query heads, then K key heads, then K value
heads), C head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.columns import Columns, Place
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.rotary import Halves, Rotary, Rotation, halves
from qwen2kit_mlx.slot_store import SlotStore
from qwen2kit_mlx.visibility import View, ragged, view


class Attend(Protocol):
    """Attention of one forward pass."""

    def __call__(self, layer: int, stacked_BTGC: mx.array) -> mx.array:
        """``[B * T, H * C]`` from a layer's queries, keys and values before rotation."""
        ...


class Anchor(NamedTuple):
    """What the keys of a layer stand without (see `rotary`), as rotations take it.

    Attributes:
        stacked: for stacked heads, after their tokens: zero for queries and values.
        apart: for queries and keys, before their tokens.
    """

    stacked: Halves
    apart: Halves

    @classmethod
    def of(cls, keys_KC: mx.array, queries: int) -> Anchor:
        """From those of the keys, beside ``queries`` query heads."""
        kv, width = keys_KC.shape
        zeros_HC, zeros_KC = mx.zeros((queries, width)), mx.zeros((kv, width))
        padded_GC = mx.concatenate([zeros_HC, keys_KC, zeros_KC])
        return cls(halves(padded_GC), halves(padded_GC[: queries + kv, None]))


class Heads:
    """What attention needs to know of a model.

    Args:
        spec: the model.
        rotary: its rotations.
        kernels: who computes.
        dtype: the compute dtype.
        anchors: ``[K, C]`` of every layer, which its keys stand without (see `rotary`), or None.

    Attributes:
        anchors: as rotations take them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rotary: Rotary,
        kernels: Kernels,
        dtype: mx.Dtype,
        anchors: Sequence[mx.array] | None,
    ) -> None:
        self.rotary, self.kernels, self._dtype = rotary, kernels, dtype
        self.query, self.kv = spec.num_attention_heads, spec.num_key_value_heads
        self.anchors: list[Anchor] | None = None
        if anchors is not None:
            self.anchors = [Anchor.of(keys_KC, self.query) for keys_KC in anchors]
            mx.eval(self.anchors)
        self.windows = [spec.window_of(layer) for layer in range(spec.num_hidden_layers)]
        self.kinds = set(self.windows)

    def views(self, see: Callable[[int | None], View]) -> dict[int | None, View]:
        """What ``see`` gives for every kind of window, masks made ready."""
        views = {window: see(window) for window in self.kinds}
        return {
            window: View(seen.first, self.kernels.mask(seen.mask, self._dtype))
            if isinstance(seen.mask, mx.array)
            else seen
            for window, seen in views.items()
        }

    def rotated(
        self, layer: int, stacked_BTGC: mx.array, rotation: Rotation
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries ``[B, H, T, C]`` and keys ``[B, K, T, C]``, rotated, and values like keys."""
        stacked = stacked_BTGC.transpose(0, 2, 1, 3)
        anchor = None if self.anchors is None else self.anchors[layer].apart
        turned = rotation(stacked[:, : self.query + self.kv], anchor)
        return turned[:, : self.query], turned[:, self.query :], stacked[:, self.query + self.kv :]

    def attention(
        self, q_BHTC: mx.array, columns: Columns, rows: slice, end: int, seen: View
    ) -> mx.array:
        """``[B * T, H * C]`` over stored columns up to ``end``."""
        scale = self.rotary.score_scale
        return joined(columns.attention(self.kernels, q_BHTC, rows, end, seen, scale))


def joined(out_BHTC: mx.array) -> mx.array:
    """``[B * T, H * C]``."""
    _, heads, _, width = out_BHTC.shape
    return out_BHTC.transpose(0, 2, 1, 3).reshape(-1, heads * width)


class Fresh:
    """Whole sequences from position 0 on; nothing is kept."""

    def __init__(self, heads: Heads, count: int) -> None:
        self._heads = heads
        self._rotation = heads.rotary.at(0, count)
        self._views = heads.views(lambda window: view(0, count, window))

    def __call__(self, layer: int, stacked_BTGC: mx.array) -> mx.array:
        """See `Attend`."""
        heads = self._heads
        q, k, v = heads.rotated(layer, stacked_BTGC, self._rotation)
        mask, scale = self._views[heads.windows[layer]].mask, heads.rotary.score_scale
        return joined(heads.kernels.attention(q, k, v, scale, mask))


class Prompt:
    """One row of a store, extended by many tokens.

    Args:
        heads: the model's.
        store: keys and values; grown to hold the tokens.
        row: which one.
        start: position of the first token.
        count: tokens.
    """

    def __init__(self, heads: Heads, store: SlotStore, row: int, start: int, count: int) -> None:
        self._heads, self._store, self._row, self._count = heads, store, row, count
        self._rotation = heads.rotary.at(start, count)
        store.slide(row, start, count)
        self._starts = {window: start - store.base(window, row) for window in heads.kinds}
        for window, first in self._starts.items():
            store.reserve(window, first + count)
        self._views = heads.views(lambda window: view(self._starts[window], count, window))

    def __call__(self, layer: int, stacked_BTGC: mx.array) -> mx.array:
        """See `Attend`; B is 1."""
        heads, columns = self._heads, self._store.layers[layer]
        window = heads.windows[layer]
        start = self._starts[window]
        q, k, v = heads.rotated(layer, stacked_BTGC, self._rotation)
        columns.write_row(self._row, start, k[0], v[0])
        rows = slice(self._row, self._row + 1)
        return heads.attention(q, columns, rows, start + self._count, self._views[window])


class Block:
    """Consecutive rows of a store, extended by a few tokens each.

    Args:
        heads: the model's.
        store: keys and values; grown to hold the tokens.
        first: the first row.
        starts: position of the first token, one per row.
        count: tokens per row.
    """

    def __init__(
        self, heads: Heads, store: SlotStore, first: int, starts: Sequence[int], count: int
    ) -> None:
        self._heads, self._store = heads, store
        positions_BT = np.array(starts)[:, None] + np.arange(count)
        self._rotation = heads.rotary.stacked(positions_BT, heads.query + heads.kv, heads.kv)
        for row, start in enumerate(starts, first):
            store.slide(row, start, count)
        self._places = {window: self._place(window, first, starts, count) for window in heads.kinds}
        self._ends = {window: self._end(window) for window in heads.kinds}
        self._views = heads.views(self._view)

    def __call__(self, layer: int, stacked_BTGC: mx.array) -> mx.array:
        """See `Attend`."""
        heads, columns = self._heads, self._store.layers[layer]
        window = heads.windows[layer]
        place = self._places[window]
        anchor = None if heads.anchors is None else heads.anchors[layer].stacked
        rotated_BTGC = self._rotation(stacked_BTGC, anchor)
        rows, count, _, width = rotated_BTGC.shape
        new_BT2KC = rotated_BTGC[:, :, heads.query :].reshape(rows, count, 2, heads.kv, width)
        columns.write(place, new_BT2KC)
        q_BHTC = rotated_BTGC[:, :, : heads.query].transpose(0, 2, 1, 3)
        seen, end = self._views[window], self._ends[window]
        return heads.attention(q_BHTC, columns, place.rows, end, seen)

    def _place(self, window: int | None, first: int, starts: Sequence[int], count: int) -> Place:
        columns = [start - self._store.base(window, row) for row, start in enumerate(starts, first)]
        place = Place.at(first, columns, count, self._heads.kv)
        self._store.reserve(window, place.end)
        return place

    def _end(self, window: int | None) -> int:
        place = self._places[window]
        padded = place.index is not None and self._heads.kernels.pads
        return self._store.room(window) if padded else place.end

    def _view(self, window: int | None) -> View:
        place = self._places[window]
        if place.index is None:
            return view(place.start, place.count, window)
        return View(0, ragged(place.columns, self._ends[window], window))


class Segments:
    """Pieces of one row of tokens, each with an attention of its own: everything else in the
    model runs over all of them together.

    Args:
        parts: (rows, tokens per row, their attention), in order.
    """

    def __init__(self, parts: Sequence[tuple[int, int, Attend]]) -> None:
        self._parts = tuple(parts)

    def __call__(self, layer: int, stacked_BTGC: mx.array) -> mx.array:
        """See `Attend`; B is 1."""
        outputs, start = [], 0
        for rows, count, attend in self._parts:
            end = start + rows * count
            piece = stacked_BTGC[:, start:end].reshape(rows, count, *stacked_BTGC.shape[2:])
            outputs.append(attend(layer, piece))
            start = end
        return mx.concatenate(outputs)
