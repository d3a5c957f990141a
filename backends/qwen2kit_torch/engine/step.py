"""One decoding step over R rows: from token ids to logits and the next token ids, on the device.

A row is one token of one sequence; rows of the same slot see each other in order, because all keys
of a step are stored before its attention. A single row goes through kernels that read weights at
the memory's speed; more rows through the vendor's matrix products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.draw_tail import DrawTail
from qwen2kit_torch.engine.draws import Scratch
from qwen2kit_torch.engine.joined import JoinedWeights, LayerWeights, Matrix
from qwen2kit_torch.engine.kernels import products
from qwen2kit_torch.engine.kernels import rows as kernels
from qwen2kit_torch.engine.layers import Layers
from qwen2kit_torch.engine.packed_products import operands
from qwen2kit_torch.engine.single_attention import SingleAttention
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import Tile, Tiles, packed_tile, tiles
from qwen2kit_torch.quantized import Quantized
from qwen2kit_torch.rope import Rope

HISTORY = 32
_VOCABULARY_BLOCK = 2048
_CHOICE_BLOCK = 8192


class Step(Layers):
    """Buffers and launches for ``count`` rows.

    Args:
        spec, weights, storage, count, rope: as for `Layers`.
        early: let kernels start before their predecessor has ended (compute capability 9).
        tiling: of a single row's products and of attention, instead of the default.
        scratch: if given, the step draws its next tokens (see `DrawTail`).

    Attributes:
        tail: draws the next tokens; None if the most likely are taken.
        rows: as for `Layers`, at first without slots; the step replaces the tokens by the next
            ones and counts the positions up.
        limit: int32 ``[1]``, ids from here on are not chosen.
        logits: ``[R, V]``.
        history: int32 ``[HISTORY, R]``, chosen ids of step ``n`` in row ``n % HISTORY``; `BROKEN`
            where logits were no numbers.
        count: int32 ``[1]``, steps so far.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        count: int,
        rope: Rope,
        *,
        early: bool,
        tiling: Tiles | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(spec, weights, storage, count, rope)
        self._early = early and count == 1
        self._tiles = tiling or self._default_tiles()
        tile = self._tiles.head
        part = tile.rows * tile.repeat if count == 1 else _VOCABULARY_BLOCK
        self._blocks = triton.cdiv(spec.vocab_size, part)
        device, dtype = weights.norm.device, weights.norm.dtype

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.rows[1] = -1
        self.limit, self.count, self.history = ints(1), ints(1), ints(HISTORY, count)
        self.logits = torch.empty(count, spec.vocab_size, dtype=dtype, device=device)
        self.tail: DrawTail | None = None
        if scratch is not None:
            self.tail = DrawTail(count, spec.vocab_size, scratch, self.count, HISTORY)
        self._best, self._best_ids = floats(count, self._blocks), ints(count, self._blocks)
        self._attention = SingleAttention(
            spec, weights, storage, count, self._tiles.keys, early=self._early
        )

    def run(self) -> None:
        """Launch the step."""
        self.embed(self.count)
        if self._r == 1:
            for index, layer in enumerate(self._weights.layers):
                self._single_layer(index, layer)
            self.single_head()
        else:
            self.run_layers(self.attend)
            torch.mm(self.final_norm(), self._weights.head.t(), out=self.logits)
        if self.tail is None:
            self.choose()
        else:
            self.tail.run(self.logits, self.rows, self.history)

    def choose(self) -> None:
        """The most likely ids become the next tokens."""
        if self._r > 1:
            kernels.best_of_blocks[(self._blocks, self._r)](
                self.logits, self.limit, self._best, self._best_ids, self._spec.vocab_size,
                self._blocks, _VOCABULARY_BLOCK,
            )  # fmt: skip
        token, slot, position = self.rows
        kernels.choose[(self._r,)](
            self._best, self._best_ids, slot, position, token, self.history, self.count,
            self._r, self._blocks, _CHOICE_BLOCK, HISTORY, **self._options(16),
        )  # fmt: skip

    def attend(self, index: int, queries: Tensor, mixed: Tensor) -> None:
        """Attention of layer ``index``."""
        self._attention(index, queries, self.rows[1], self.rows[2], mixed)

    def project_heads(self, index: int) -> None:
        """Rotated queries of a single row; its keys and values go into the slot."""
        spec, tile, layer = self._spec, self._tiles.heads, self._weights.layers[index]
        keys, values = self._storage.layers[index]
        weights, form = operands(layer.heads)
        products.project_heads[(layer.heads.shape[0] // tile.rows,)](
            self.x, layer.norm, *weights, layer.heads_bias, *self._turning(layer), self.rows[1],
            self.rows[2], self._queries, keys, values, self._storage.capacity, spec.rms_norm_eps,
            spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim,
            layer.anchor is not None, spec.hidden_size, tile.rows, tile.block, *form,
            **self._options(tile.warps),
        )  # fmt: skip

    def add_out(self, layer: LayerWeights) -> None:
        """The output projection of a single row."""
        self._add_product(self._mixed, layer.out, self._tiles.out)

    def gate_up(self, layer: LayerWeights) -> None:
        """The gated activation of a single row."""
        spec, tile = self._spec, self._tiles.gate_up
        weights, form = operands(layer.gate_up)
        products.gate_up[(triton.cdiv(spec.intermediate_size, tile.rows // 2),)](
            self.x, layer.mlp_norm, *weights, self._gated, spec.rms_norm_eps,
            spec.intermediate_size, spec.hidden_size, tile.rows, tile.block, *form,
            **self._options(tile.warps),
        )  # fmt: skip

    def add_down(self, layer: LayerWeights) -> None:
        """The down projection of a single row."""
        self._add_product(self._gated, layer.down, self._tiles.down)

    def single_head(self) -> None:
        """Logits of a single row, and the best of each part of the vocabulary."""
        spec, tile = self._spec, self._tiles.head
        products.head[(self._blocks,)](
            self.x, self._weights.norm, self._weights.head, self.logits, self.limit, self._best,
            self._best_ids, spec.rms_norm_eps, spec.vocab_size, spec.hidden_size, tile.repeat,
            tile.rows, tile.block, **self._options(tile.warps),
        )  # fmt: skip

    def _single_layer(self, index: int, layer: LayerWeights) -> None:
        self.project_heads(index)
        self.attend(index, self._queries, self._mixed)
        self.add_out(layer)
        self.gate_up(layer)
        self.add_down(layer)

    def _add_product(self, x: Tensor, matrix: Matrix, tile: Tile) -> None:
        height, width = matrix.shape
        weights, form = operands(matrix)
        products.add_product[(triton.cdiv(height, tile.rows),)](
            x, *weights, self.x, height, width, tile.rows, tile.block, *form,
            **self._options(tile.warps),
        )  # fmt: skip

    def _options(self, warps: int) -> dict[str, Any]:
        options: dict[str, Any] = {"PDL": self._early, "num_warps": warps}
        return options | {"launch_pdl": True} if self._early else options

    def _default_tiles(self) -> Tiles:
        spec, layer = self._spec, self._weights.layers[0]
        width = spec.num_attention_heads * spec.head_dim
        found = tiles(
            spec.hidden_size, width, spec.intermediate_size, self._weights.norm.dtype.itemsize
        )
        products = {
            "heads": layer.heads, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down
        }  # fmt: skip
        changes: dict[str, Any] = {
            name: packed_tile(*matrix.shape, matrix.bits)
            for name, matrix in products.items()
            if isinstance(matrix, Quantized)
        }
        return replace(found, **changes)
