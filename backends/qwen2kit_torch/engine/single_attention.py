"""Attention of single tokens to their slots: buffers and launches.

Shapes: R rows, H query heads, K kv heads, C head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.joined import JoinedWeights
from qwen2kit_torch.engine.kernels import attention
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import KeysTile, power_of_two

_PROGRAMS = 264
_MOST_SPLITS = 32


class SingleAttention:
    """Of up to ``count`` rows; buffers that passes may share, if no two run at the same time.

    Args:
        spec, weights, storage: the model and its slots.
        count: the most R may be.
        tile: how keys are taken.
        early: let the kernel start before its predecessor has ended (compute capability 9); takes
            R = 1.
        least_splits: ranges that a row's keys may be divided into, however many rows there are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        count: int,
        tile: KeysTile,
        *,
        early: bool = False,
        least_splits: int = 1,
    ) -> None:
        self._spec, self._storage, self._tile = spec, storage, tile
        self._options: dict[str, Any] = {"PDL": early, "num_warps": tile.warps}
        if early:
            self._options["launch_pdl"] = True
        self._windows = [layer.window or 0 for layer in weights.layers]
        self._group = max(16, power_of_two(spec.num_attention_heads // spec.num_key_value_heads))
        self._splits = self._count_splits(count, least_splits)
        pairs, device = (count, spec.num_key_value_heads), weights.norm.device
        self._arrived = torch.zeros(pairs, dtype=torch.int32, device=device)
        cells = (*pairs, self._splits, self._group)
        self._parts = torch.empty(*cells, spec.head_dim, device=device)
        self._shares = torch.empty(*cells, 2, device=device)

    def __call__(
        self, index: int, queries: Tensor, slots: Tensor, positions: Tensor, mixed: Tensor
    ) -> None:
        """Launch that of layer ``index``.

        Args:
            index: of the layer.
            queries: ``[>= R, H * C]``, rotated.
            slots: int32 ``[R]``; rows of negative ones are skipped.
            positions: int32 ``[>= R]``.
            mixed: ``[>= R, H * C]``, receives the result.
        """
        spec, tile = self._spec, self._tile
        keys, values = self._storage.layers[index]
        attention.attend[(self._splits, spec.num_key_value_heads, len(slots))](
            queries, keys, values, slots, positions, mixed, self._parts, self._shares,
            self._arrived, self._storage.capacity, spec.head_dim**-0.5, spec.num_attention_heads,
            spec.num_key_value_heads, spec.head_dim, self._windows[index], self._splits,
            tile.spread, tile.keys, self._group, **self._options,
        )  # fmt: skip

    def _count_splits(self, count: int, least: int) -> int:
        """Ranges that fill the device for ``count`` rows, each of one block at least."""
        most = min(_MOST_SPLITS, triton.cdiv(self._storage.capacity, self._tile.keys))
        wanted = max(least, _PROGRAMS // (self._spec.num_key_value_heads * count))
        return power_of_two(max(1, min(most, wanted)))
