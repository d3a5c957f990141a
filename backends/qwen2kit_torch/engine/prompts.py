"""Passes over many tokens: whole prompts or long pieces of them, several at once, unpadded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.joined import JoinedWeights
from qwen2kit_torch.engine.kernels import prompt
from qwen2kit_torch.engine.layers import Layers
from qwen2kit_torch.engine.pieces import Piece
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import PromptTile, prompt_tile
from qwen2kit_torch.rope import Rope


class PromptPass(Layers):
    """One pass over ``pieces``.

    Args:
        spec, weights, storage, rope: as for `Layers`.
        pieces: what to append to which slots.
        tile: of attention, instead of the default.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        pieces: Sequence[Piece],
        rope: Rope,
        tile: PromptTile | None = None,
    ) -> None:
        super().__init__(spec, weights, storage, sum(len(p.tokens) for p in pieces), rope)
        device = weights.norm.device
        self._tile = tile or prompt_tile(spec.head_dim, weights.norm.dtype.itemsize)
        tiles = _tiles(pieces, self._tile.rows)
        packed = np.concatenate([_rows(pieces).ravel(), _wanted(pieces), tiles.ravel()])
        on_device = torch.from_numpy(packed).to(device)
        count, wanted = 3 * self._r, sum(piece.wanted for piece in pieces)
        self.rows = on_device[:count].view(3, self._r)
        self._wanted = on_device[count : count + wanted]
        self._tiles = on_device[count + wanted :].view(-1, 4)

    def hidden(self) -> Tensor:
        """Run it; the final norm's output ``[N, D]`` of the wanted positions."""
        self.embed(torch.zeros(1, dtype=torch.int32, device=self.x.device))
        self.run_layers(self._attend)
        return self.final_norm(self._wanted)

    def _attend(self, index: int, queries: Tensor, mixed: Tensor) -> None:
        spec, tile = self._spec, self._tile
        keys, values = self._storage.layers[index]
        prompt.attend_tiles[(len(self._tiles), spec.num_attention_heads)](
            queries, keys, values, self._tiles, mixed, self._storage.capacity,
            spec.head_dim**-0.5, spec.num_attention_heads, spec.num_key_value_heads,
            spec.head_dim, self._weights.layers[index].window or 0, tile.rows, tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _rows(pieces: Sequence[Piece]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Token, slot and position of every row, ``[3, R]``."""
    lengths = [len(piece.tokens) for piece in pieces]
    tokens = [token for piece in pieces for token in piece.tokens]
    slots = np.repeat([piece.slot for piece in pieces], lengths)
    positions = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
    return np.stack([tokens, slots, positions]).astype(np.int32)


def _wanted(pieces: Sequence[Piece]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Rows whose hidden states are wanted."""
    ends = np.cumsum([len(piece.tokens) for piece in pieces])
    parts = [np.arange(end - p.wanted, end) for end, p in zip(ends, pieces, strict=True)]
    return np.concatenate(parts).astype(np.int32)


def _tiles(pieces: Sequence[Piece], size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """First row, rows, slot and first position of every tile of queries, ``[tiles, 4]``."""
    found = []
    row = 0
    for piece in pieces:
        for done in range(0, len(piece.tokens), size):
            count = min(size, len(piece.tokens) - done)
            found.append((row + done, count, piece.slot, piece.start + done))
        row += len(piece.tokens)
    return np.array(found, dtype=np.int32)
