"""Which piece of which example goes into which row, and the rows as arrays.

A document of ``n`` tokens is ``n - 1`` pairs of input and label, so labels never cross a
boundary. Pre-training cuts documents where a row is full; the piece in the next row starts anew
at position 0. Conversations are never cut: they go into the first open row with room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.data.corpus import Corpus

IGNORED = -100
_OPEN_ROWS = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Pairs ``begin : begin + length`` of one example."""

    example: int
    begin: int
    length: int


Plan = list[list[Piece]]
"""The pieces of every row."""


def plan_rows(
    lengths: NDArray[np.int64],
    order: NDArray[np.int64],
    seq_len: int,
    *,
    packing: bool,
    split: bool,
) -> Plan:
    """Lay out examples in ``order``.

    Args:
        lengths: tokens per example, int64 ``[examples]``.
        order: example indices.
        seq_len: pairs per row.
        packing: several examples may share a row.
        split: examples may be cut; otherwise each must fit one row.
    """
    pairs = [(int(i), int(lengths[i]) - 1) for i in order if lengths[i] > 1]
    if not split:
        assert all(count <= seq_len for _, count in pairs)
    if not packing:
        return [[piece] for i, count in pairs for piece in _cut(i, count, seq_len)]
    return _concatenate(pairs, seq_len) if split else _first_fit(pairs, seq_len)


def _cut(example: int, count: int, seq_len: int) -> list[Piece]:
    return [
        Piece(example, begin, min(seq_len, count - begin)) for begin in range(0, count, seq_len)
    ]


def _concatenate(pairs: list[tuple[int, int]], seq_len: int) -> Plan:
    plan: Plan = []
    room = 0
    for example, count in pairs:
        begin = 0
        while begin < count:
            if room == 0:
                plan.append([])
                room = seq_len
            length = min(room, count - begin)
            plan[-1].append(Piece(example, begin, length))
            begin += length
            room -= length
    return plan


def _first_fit(pairs: list[tuple[int, int]], seq_len: int) -> Plan:
    plan: Plan = []
    open_rows: list[tuple[int, int]] = []
    for example, count in pairs:
        slot = next((s for s, (_, room) in enumerate(open_rows) if room >= count), None)
        if slot is None:
            if len(open_rows) == _OPEN_ROWS:
                open_rows.pop(0)
            plan.append([])
            open_rows.append((len(plan) - 1, seq_len))
            slot = len(open_rows) - 1
        row, room = open_rows[slot]
        plan[row].append(Piece(example, 0, count))
        open_rows[slot] = (row, room - count)
        if room == count:
            open_rows.pop(slot)
    return plan


def fill_rows(corpus: Corpus, rows: Plan, seq_len: int, pad_id: int) -> TokenBatch:
    """The rows as arrays ``[len(rows), seq_len]``; padding: ``pad_id``, label -100, document -1."""
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, dtype=np.int32)
    labels = np.full(shape, IGNORED, dtype=np.int32)
    positions = np.zeros(shape, dtype=np.int32)
    documents = np.full(shape, -1, dtype=np.int32)
    for r, pieces in enumerate(rows):
        column = 0
        for number, piece in enumerate(pieces):
            here = slice(column, column + piece.length)
            start = int(corpus.offsets[piece.example]) + piece.begin
            source = slice(start, start + piece.length)
            target = slice(start + 1, start + 1 + piece.length)
            tokens[r, here] = corpus.tokens[source]
            labels[r, here] = np.where(
                corpus.supervised[target], corpus.tokens[target], np.int32(IGNORED)
            )
            positions[r, here] = np.arange(piece.length, dtype=np.int32)
            documents[r, here] = number
            column += piece.length
    return TokenBatch(tokens, labels, positions, documents)
