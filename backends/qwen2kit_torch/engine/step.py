"""One decoding step over R rows: from token ids to logits and the next token ids, on the device.

A row is one token of one sequence; rows of the same slot see each other in order, because all keys
of a step are stored before its attention. A single row goes through kernels that read weights at
the memory's speed; more rows through the vendor's matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.joined import JoinedWeights, LayerWeights
from qwen2kit_torch.engine.kernels import attention, products, rows
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import Tiles, power_of_two, tiles

HISTORY = 32
_PROGRAMS = 264
_MOST_SPLITS = 64
_VOCABULARY_BLOCK = 2048


class Step:
    """Buffers and launches for ``count`` rows.

    Args:
        spec, weights, storage: the model and its slots.
        count: R.
        rope: cosines and sign-folded sines ``[>= capacity, C]``, in the compute dtype.
        early: let kernels start before their predecessor has ended (compute capability 9).
        tiling: for a single row, instead of the default.

    Attributes:
        rows: int32 ``[3, R]``: token ids, slots (negative: none) and positions. The step replaces
            the tokens by the next ones and counts the positions up.
        limit: int32 ``[1]``, ids from here on are not chosen.
        logits: ``[R, V]``.
        history: int32 ``[HISTORY, R]``, chosen ids of step ``n`` in row ``n % HISTORY``; -1 where
            logits were no numbers.
        count: int32 ``[1]``, steps so far.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        count: int,
        rope: tuple[Tensor, Tensor],
        *,
        early: bool,
        tiling: Tiles | None = None,
    ) -> None:
        self._spec, self._weights, self._storage, self._rope = spec, weights, storage, rope
        self._r, self._early = count, early
        width = spec.num_attention_heads * spec.head_dim
        self._tiles = tiling or tiles(spec.hidden_size, spec.head_dim, width)
        self._splits = self._count_splits()
        self._scale = spec.head_dim**-0.5
        self._group = max(16, power_of_two(spec.num_attention_heads // spec.num_key_value_heads))
        tile = self._tiles.head
        blocks = triton.cdiv(
            spec.vocab_size, tile.rows * tile.repeat if count == 1 else _VOCABULARY_BLOCK
        )
        self._blocks = blocks
        device, dtype = weights.norm.device, weights.norm.dtype

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def values(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows, self.limit, self.count, self.history = (
            ints(3, count), ints(1), ints(1), ints(HISTORY, count)
        )  # fmt: skip
        self.rows[1] = -1
        self.logits = values(count, spec.vocab_size)
        self._x, self._normed, self._added = (values(count, spec.hidden_size) for _ in range(3))
        self._joint = values(count, len(weights.layers[0].heads))
        self._queries, self._mixed = values(count, width), values(count, width)
        self._wide = values(count, 2 * spec.intermediate_size)
        self._gated = values(count, spec.intermediate_size)
        self._best, self._best_ids = floats(count, blocks), ints(count, blocks)
        pairs = (count, spec.num_key_value_heads)
        self._arrived = ints(*pairs)
        self._parts = floats(*pairs, self._splits, self._group, spec.head_dim)
        self._shares = floats(*pairs, self._splits, self._group, 2)

    def run(self) -> None:
        """Launch the step."""
        spec, weights = self._spec, self._weights
        hidden = spec.hidden_size
        rows.embed[(self._r,)](
            self.rows[0], weights.embedding, self._x, self.count, hidden, power_of_two(hidden)
        )
        layer_step = self._single if self._r == 1 else self._several
        for index, layer in enumerate(weights.layers):
            layer_step(index, layer)
        if self._r == 1:
            self._single_head()
        else:
            self._several_heads()
        token, slot, position = self.rows
        rows.choose[(self._r,)](
            self._best, self._best_ids, slot, position, token, self.history, self.count,
            self._r, self._blocks, 1024, HISTORY, **self._options(8),
        )  # fmt: skip

    def _single(self, index: int, layer: LayerWeights) -> None:
        self._project_heads(index, layer)
        self._attend(index, layer)
        self._add_product(self._mixed, layer.out, self._tiles.out)
        self._gate_up_product(layer)
        self._add_product(self._gated, layer.down, self._tiles.down)

    def _gate_up_product(self, layer: LayerWeights) -> None:
        spec, tile = self._spec, self._tiles.gate_up
        products.gate_up[(triton.cdiv(spec.intermediate_size, tile.rows // 2),)](
            self._x, layer.mlp_norm, layer.gate_up, self._gated, spec.rms_norm_eps,
            spec.intermediate_size, spec.hidden_size, tile.rows, tile.block,
            **self._options(tile.warps),
        )  # fmt: skip

    def _project_heads(self, index: int, layer: LayerWeights) -> None:
        spec, tile = self._spec, self._tiles.heads
        keys, values = self._storage.layers[index]
        products.project_heads[(len(layer.heads) // tile.rows,)](
            self._x, layer.norm, layer.heads, layer.heads_bias, *self._rope, self.rows[1],
            self.rows[2], self._queries, keys, values, self._storage.capacity, spec.rms_norm_eps,
            spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, spec.hidden_size,
            tile.rows, tile.block, **self._options(tile.warps),
        )  # fmt: skip

    def _add_product(self, x: Tensor, weight: Tensor, tile: Any) -> None:
        height, width = weight.shape
        products.add_product[(triton.cdiv(height, tile.rows),)](
            x, weight, self._x, height, width, tile.rows, tile.block, **self._options(tile.warps)
        )

    def _single_head(self) -> None:
        spec, tile = self._spec, self._tiles.head
        products.head[(self._blocks,)](
            self._x, self._weights.norm, self._weights.head, self.logits, self.limit, self._best,
            self._best_ids, spec.rms_norm_eps, spec.vocab_size, spec.hidden_size, tile.repeat,
            tile.rows, tile.block, **self._options(tile.warps),
        )  # fmt: skip

    def _several(self, index: int, layer: LayerWeights) -> None:
        spec = self._spec
        self._norm(layer.norm, adds=index > 0)
        torch.addmm(layer.heads_bias, self._normed, layer.heads.t(), out=self._joint)
        keys, values = self._storage.layers[index]
        heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
        rows.rotate_and_store[(heads, self._r)](
            self._joint, *self._rope, self.rows[1], self.rows[2], self._queries, keys, values,
            self._storage.capacity, spec.num_attention_heads, spec.num_key_value_heads,
            spec.head_dim, num_warps=1,
        )  # fmt: skip
        self._attend(index, layer)
        torch.mm(self._mixed, layer.out.t(), out=self._added)
        self._norm(layer.mlp_norm, adds=True)
        torch.mm(self._normed, layer.gate_up.t(), out=self._wide)
        ffn = spec.intermediate_size
        rows.silu_times[(triton.cdiv(ffn, 1024), self._r)](self._wide, self._gated, ffn, 1024)
        torch.mm(self._gated, layer.down.t(), out=self._added)

    def _several_heads(self) -> None:
        vocab = self._spec.vocab_size
        self._norm(self._weights.norm, adds=True)
        torch.mm(self._normed, self._weights.head.t(), out=self.logits)
        rows.best_of_blocks[(self._blocks, self._r)](
            self.logits, self.limit, self._best, self._best_ids, vocab, self._blocks,
            _VOCABULARY_BLOCK,
        )  # fmt: skip

    def _norm(self, weight: Tensor, *, adds: bool) -> None:
        hidden = self._spec.hidden_size
        rows.add_and_norm[(self._r,)](
            self._x, self._added, weight, self._normed, self._spec.rms_norm_eps, adds, hidden,
            power_of_two(hidden), num_warps=8 if hidden > 1024 else 4,
        )  # fmt: skip

    def _attend(self, index: int, layer: LayerWeights) -> None:
        spec = self._spec
        keys, values = self._storage.layers[index]
        attention.attend[(self._splits, spec.num_key_value_heads, self._r)](
            self._queries, keys, values, self.rows[1], self.rows[2], self._mixed, self._parts,
            self._shares, self._arrived, self._storage.capacity, self._scale,
            spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, layer.window or 0,
            self._splits, self._tiles.keys, self._group, **self._options(4),
        )  # fmt: skip

    def _options(self, warps: int) -> dict[str, Any]:
        early = self._early and self._r == 1
        options: dict[str, Any] = {"PDL": early, "num_warps": warps}
        return options | {"launch_pdl": True} if early else options

    def _count_splits(self) -> int:
        """Ranges that fill the device for this number of rows, each of one block at least."""
        most = min(_MOST_SPLITS, triton.cdiv(self._storage.capacity, self._tiles.keys))
        wanted = _PROGRAMS // (self._spec.num_key_value_heads * self._r)
        return power_of_two(max(1, min(most, wanted)))
