"""Passes over many tokens: pieces of prompts, several at once, unpadded, and single tokens of other
slots with them, so that the weights are read once for both.

Shapes: R rows, S single tokens, N wanted rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.backend.slots import Feed
from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.joined import JoinedWeights
from qwen2kit_torch.engine.kernels import prompt
from qwen2kit_torch.engine.layers import Buffers, Layers
from qwen2kit_torch.engine.pieces import Piece
from qwen2kit_torch.engine.sending import send
from qwen2kit_torch.engine.single_attention import SingleAttention
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import PromptTile, keys_tile, prompt_tile
from qwen2kit_torch.rope import Rope

_LEAST_SPLITS = 4
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PassSize:
    """Of a pass's buffers.

    Attributes:
        rows: R.
        pieces: that are read from prompts.
        singles: S, 0 for none.
        wanted: N.
    """

    rows: int
    pieces: int
    singles: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Workspace:
    """What passes may share, if no two of them run at the same time.

    Attributes:
        buffers: of as many rows as the largest pass has.
        singles: attention of as many single tokens; None if there are none.
        logits: ``[N, V]`` of as many wanted rows.
    """

    buffers: Buffers
    singles: SingleAttention | None
    logits: Tensor

    @classmethod
    def of(
        cls, spec: ModelSpec, weights: JoinedWeights, storage: Storage, size: PassSize
    ) -> Workspace:
        """For passes of up to ``size``."""
        norm, singles = weights.norm, None
        if size.singles:
            tile = keys_tile(norm.dtype.itemsize)
            singles = SingleAttention(
                spec, weights, storage, size.singles, tile, least_splits=_LEAST_SPLITS
            )
        logits = norm.new_empty(size.wanted, spec.vocab_size)
        return cls(Buffers(spec, weights, size.rows), singles, logits)


class PromptPass(Layers):
    """Buffers and launches of a pass of up to ``size``.

    Args:
        spec, weights, storage, rope: as for `Layers`.
        size: of what `set` may be given.
        tile: of attention over pieces, instead of the default.
        workspace: its own if None.

    Attributes:
        logits: ``[N, V]`` of the wanted rows, in the order of their feeds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        rope: Rope,
        size: PassSize,
        *,
        tile: PromptTile | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        workspace = workspace or Workspace.of(spec, weights, storage, size)
        super().__init__(spec, weights, storage, size.rows, rope, workspace.buffers)
        norm = weights.norm
        self._tile = tile or prompt_tile(spec.head_dim, norm.dtype.itemsize)
        tiles = size.rows // self._tile.rows + size.pieces
        parts = [3 * size.rows, size.wanted, size.singles, 4 * tiles]
        self._ends = np.cumsum(parts)[:-1]
        self._given = torch.zeros(sum(parts), dtype=torch.int32, device=norm.device)
        rows, self._wanted, self._slots, tiled = torch.split(self._given, parts)
        self.rows, self._tiles = rows.view(3, -1), tiled.view(-1, 4)
        self._count = torch.zeros(1, dtype=torch.int32, device=norm.device)
        self._singles = workspace.singles
        self.logits = workspace.logits[: size.wanted]
        self.set([])

    def set(
        self,
        feeds: Sequence[Feed | Piece],
        order: Sequence[int] | None = None,
        singles: int = 0,
    ) -> None:
        """What the next `run` computes; the rest of the buffers stays unused.

        Args:
            feeds: what to append to which slots, and what is wanted of it.
            order: in which they are laid end to end; as they come if None.
            singles: how many of these are taken token by token, the rows from 0 on.
        """
        packed = np.zeros(len(self._given), dtype=np.int32)
        rows, wanted, slots, tiles = np.split(packed, self._ends)
        rows = rows.reshape(3, -1)
        rows[1], slots[:] = -1, -1
        if feeds:
            order = range(len(feeds)) if order is None else order
            laid = [feeds[index] for index in order]
            ends = np.cumsum([len(feed.tokens) for feed in laid])
            rows[:, : ends[-1]] = rows_of(laid)
            single = int(ends[singles - 1]) if singles else 0
            slots[:single] = rows[1, :single]
            tiled = _tiles(laid[singles:], single, self._tile.rows)
            tiles[: len(tiled)] = tiled
            counts = np.array([feed.wanted for feed in feeds])
            own = np.empty_like(ends)
            own[list(order)] = ends
            found = ranges(own - counts, counts)
            wanted[: len(found)] = found
        send(packed, self._given)

    def run(self) -> None:
        """Launch the pass."""
        self.embed(self._count)
        self.run_layers(self._attend)
        torch.mm(self.final_norm(self._wanted), self._weights.head.t(), out=self.logits)

    def _attend(self, index: int, queries: Tensor, mixed: Tensor) -> None:
        spec, tile = self._spec, self._tile
        if self._singles is not None and len(self._slots):
            self._singles(index, queries, self._slots, self.rows[2], mixed)
        keys, values = self._storage.layers[index]
        prompt.attend_tiles[(len(self._tiles), spec.num_attention_heads)](
            queries, keys, values, self._tiles, mixed, self._storage.capacity,
            spec.head_dim**-0.5, spec.num_attention_heads, spec.num_key_value_heads,
            spec.head_dim, self._weights.layers[index].window or 0, tile.rows, tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def rows_of(feeds: Sequence[Feed | Piece]) -> Ints:
    """Token, slot and position of every token ``[3, R]`` of feeds, end to end."""
    lengths = np.array([len(feed.tokens) for feed in feeds])
    tokens = [token for feed in feeds for token in feed.tokens]
    slots = np.repeat([feed.slot for feed in feeds], lengths)
    positions = ranges(np.array([feed.start for feed in feeds]), lengths)
    return np.stack([tokens, slots, positions]).astype(np.int32)


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``starts[i]``, ``starts[i] + 1``, ... for ``lengths[i]`` numbers, one range after another."""
    before = np.cumsum(lengths) - lengths
    found: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return found


def _tiles(pieces: Sequence[Feed | Piece], row: int, size: int) -> Ints:
    """First row, rows, slot and first position of every tile of queries, flat; the first piece
    begins at ``row``."""
    found = []
    for piece in pieces:
        for done in range(0, len(piece.tokens), size):
            count = min(size, len(piece.tokens) - done)
            found.append((row + done, count, piece.slot, piece.start + done))
        row += len(piece.tokens)
    return np.array(found, dtype=np.int32).reshape(-1)
