"""Which tokens go through the model together.

A pass takes short feeds (decoding, speculation) as rows of one padded block and lays long ones
(prefill) end to end after it: the weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen2kit.backend.slots import Feed

PREFILL_TOKENS = 2048  # tokens of long feeds per pass
SHORT = 16  # feeds of up to this many tokens become rows of the block


@dataclass(frozen=True, slots=True)
class Piece:
    """A feed, or a part of a long one.

    Attributes:
        feed: index of the feed in its call.
        slot, start, tokens, wanted: see `Feed`.
    """

    feed: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    wanted: int

    @property
    def short(self) -> bool:
        """Whether it is a row of the block."""
        return len(self.tokens) <= SHORT


def passes(feeds: Sequence[Feed]) -> Iterator[list[Piece]]:
    """The pieces of each pass; of a feed that is cut up, parts follow in order."""
    pieces: list[Piece] = []
    room = PREFILL_TOKENS
    for index, feed in enumerate(feeds):
        if len(feed.tokens) <= SHORT:
            pieces.append(Piece(index, feed.slot, feed.start, feed.tokens, feed.wanted))
            continue
        done = 0
        while done < len(feed.tokens):
            if not room:
                yield pieces
                pieces, room = [], PREFILL_TOKENS
            piece = _part(index, feed, done, room)
            pieces.append(piece)
            done += len(piece.tokens)
            room -= len(piece.tokens)
    if pieces:
        yield pieces


def _part(index: int, feed: Feed, done: int, room: int) -> Piece:
    """What fits into ``room`` of the tokens from ``done`` on."""
    tokens = feed.tokens[done : done + room]
    left = len(feed.tokens) - done - len(tokens)
    wanted = min(len(tokens), max(0, feed.wanted - left))
    return Piece(index, feed.slot, feed.start + done, tokens, wanted)
