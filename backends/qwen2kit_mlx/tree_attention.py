"""Attention of a pack: many paths of a prefix tree in one row of tokens.

Shape suffixes as in `attention`; S columns (trunk, then the pack).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from qwen2kit.generate.prefix_pack import Pack
from qwen2kit_mlx.attention import Heads
from qwen2kit_mlx.slot_store import SlotStore
from qwen2kit_mlx.visibility import View

PAD_TOKENS = 128  # multiples of which repeat, where shapes should


class Tree:
    """Row 0 of a store, whose first columns are the pack's trunk, extended by the pack.

    Args:
        heads: the model's.
        store: keys and values; grown to hold the pack.
        pack: tokens of several runs.

    Attributes:
        count: tokens to run: the pack's, then padding that nothing sees.
    """

    def __init__(self, heads: Heads, store: SlotStore, pack: Pack) -> None:
        self._heads, self._store, self._pack = heads, store, pack
        step = PAD_TOKENS if heads.kernels.pads else 1
        self.count = -(-len(pack.tokens) // step) * step
        self._start = len(pack.kept)
        end = self._start + self.count
        for window in heads.kinds:
            store.reserve(window, end)
        self._end = store.room(heads.windows[0]) if heads.kernels.pads else end
        positions = np.pad(pack.positions, (0, self.count - len(pack.tokens)))
        self._rotation = heads.rotary.scattered(positions)
        self._views = heads.views(self._view)

    def __call__(self, layer: int, stacked_BTGC: mx.array) -> mx.array:
        """See `Attend`; B is 1."""
        heads, columns = self._heads, self._store.layers[layer]
        q, k, v = heads.rotated(layer, stacked_BTGC, self._rotation)
        columns.write_row(0, self._start, k[0], v[0])
        seen = self._views[heads.windows[layer]]
        return heads.attention(q, columns, slice(0, 1), self._end, seen)

    def _view(self, window: int | None) -> View:
        visible_TS = np.zeros((self.count, self._end), dtype=np.bool_)
        own = self._pack.visible(window)
        visible_TS[: own.shape[0], : own.shape[1]] = own
        visible_TS[own.shape[0] :, 0] = True  # padding has to see something
        return View(0, mx.array(visible_TS)[None, None])
