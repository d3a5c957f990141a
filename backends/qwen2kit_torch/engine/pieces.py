"""One forward pass over pieces of several sequences, laid end to end without padding.

Shapes: T tokens of all pieces together, H query heads, K kv heads, S slots, P positions,
C head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2kit.backend.slots import Feed
from qwen2kit_torch.attention import Visibility, visibilities
from qwen2kit_torch.engine.storage import Storage

TOKENS_PER_PASS = 2048


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence.

    Attributes:
        slot: where the sequence lives.
        start: position of the first token.
        tokens: at least one id.
        wanted: how many of the last tokens' hidden states are wanted.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    wanted: int

    @property
    def end(self) -> int:
        """Positions the slot holds afterwards."""
        return self.start + len(self.tokens)


def passes(feeds: Iterable[Feed], budget: int) -> Iterator[list[Piece]]:
    """Cut feeds into passes of at most ``budget`` tokens, in order."""
    pieces: list[Piece] = []
    room = budget
    for feed in feeds:
        done, total = 0, len(feed.tokens)
        while done < total:
            end = min(total, done + room)
            wanted = max(0, end - max(done, total - feed.wanted))
            pieces.append(Piece(feed.slot, feed.start + done, feed.tokens[done:end], wanted))
            room -= end - done
            done = end
            if room == 0:
                yield pieces
                pieces, room = [], budget
    if pieces:
        yield pieces


class PackedCache:
    """The slots as one pass sees them: a cache of one row that holds all pieces.

    Attributes:
        length: the largest position of a first token, which bounds the rotary table.
    """

    def __init__(self, storage: Storage, pieces: Sequence[Piece]) -> None:
        self._storage, self._pieces = storage, pieces
        self.length = max(piece.start for piece in pieces)

    def reserve(self, new: int) -> None:
        """Nothing: slots have their final size."""

    def append(self, layer: int, k_1KTC: Tensor, v_1KTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns the layer's slots ``[S, K, P, C]``."""
        keys, values = self._storage.layers[layer]
        done = 0
        for piece in self._pieces:
            own = slice(done, done + len(piece.tokens))
            keys[piece.slot, :, piece.start : piece.end] = k_1KTC[0, :, own]
            values[piece.slot, :, piece.start : piece.end] = v_1KTC[0, :, own]
            done = own.stop
        return keys, values

    def advance(self, new: int) -> None:
        """Nothing: who feeds the slots knows their lengths."""


class PackedAttend:
    """Attention of every piece to its own slot, for one kind of layer.

    Args:
        pieces: of the pass.
        window: sliding-window length in tokens, or None.
        device: where masks are built.
    """

    def __init__(self, pieces: Sequence[Piece], window: int | None, device: torch.device) -> None:
        self._pieces = pieces
        self._lengths = [len(piece.tokens) for piece in pieces]
        self._first = [_first_key(piece, window) for piece in pieces]
        self._visible = [
            _visible(piece, first, window, device)
            for piece, first in zip(pieces, self._first, strict=True)
        ]

    def __call__(self, q_1HTC: Tensor, k_SKPC: Tensor, v_SKPC: Tensor) -> Tensor:
        """Output ``[1, H, T, C]``."""
        out = []
        queries = torch.split(q_1HTC, self._lengths, dim=2)
        for piece, first, visible, query in zip(
            self._pieces, self._first, self._visible, queries, strict=True
        ):
            keys = k_SKPC[piece.slot, None, :, first : piece.end]
            values = v_SKPC[piece.slot, None, :, first : piece.end]
            out.append(visible(query, keys, values))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def positions_of(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """Positions of all tokens, ``[1, T]``."""
    counted = [position for piece in pieces for position in range(piece.start, piece.end)]
    return torch.tensor([counted], device=device)


def _first_key(piece: Piece, window: int | None) -> int:
    return 0 if window is None else max(0, piece.start + 1 - window)


def _visible(piece: Piece, first: int, window: int | None, device: torch.device) -> Visibility:
    length = len(piece.tokens)
    if length == 1:
        return Visibility(None, causal=False)
    start = piece.start - first
    found = visibilities([window], start=start, length=length, documents=None, device=device)
    return found[window]
