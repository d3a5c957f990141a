"""Which piece of which example goes into which row, and the rows as arrays.

A document of ``n`` tokens is ``n - 1`` pairs of input and label, so labels never cross a
boundary. Pre-training cuts documents where a row is full; the piece in the next row starts anew
at position 0. Conversations are never cut: they go into the first open row with room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import TokenBatch

IGNORED = -100
_OPEN_ROWS = 64

Span = tuple[NDArray[np.int32], NDArray[np.bool_] | None]
"""Tokens, and which of them are to be predicted (None: all)."""


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


class Examples(Protocol):
    """Examples by number.

    Attributes:
        lengths: tokens per example, int64 ``[examples]``.
    """

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, int64 ``[examples]``."""
        ...

    def __len__(self) -> int: ...

    def read(self, example: int, begin: int, count: int) -> Span:
        """``count`` tokens of ``example`` from ``begin`` on."""
        ...

    def select(self, indices: NDArray[np.int64]) -> Examples:
        """The examples at ``indices``, in that order."""
        ...

    def fingerprint(self) -> str:
        """Digest of the contents."""
        ...


def empty_rows(rows: int, seq_len: int, pad_id: int) -> TokenBatch:
    """Padding only, ``[rows, seq_len]``: token ``pad_id``, label -100, document -1."""
    shape = (rows, seq_len)
    return TokenBatch(
        tokens=np.full(shape, pad_id, dtype=np.int32),
        labels=np.full(shape, IGNORED, dtype=np.int32),
        positions=np.zeros(shape, dtype=np.int32),
        documents=np.full(shape, -1, dtype=np.int32),
    )


def fill_rows(examples: Examples, rows: Plan, seq_len: int, pad_id: int) -> TokenBatch:
    """The rows as arrays ``[len(rows), seq_len]``, padded as `empty_rows`."""
    batch = empty_rows(len(rows), seq_len, pad_id)
    for r, pieces in enumerate(rows):
        column = 0
        for number, piece in enumerate(pieces):
            here = slice(column, column + piece.length)
            tokens, supervised = examples.read(piece.example, piece.begin, piece.length + 1)
            batch.tokens[r, here] = tokens[:-1]
            batch.labels[r, here] = labels_of(tokens, supervised)
            batch.positions[r, here] = np.arange(piece.length, dtype=np.int32)
            batch.documents[r, here] = number
            column += piece.length
    return batch


def labels_of(tokens: NDArray[np.int32], supervised: NDArray[np.bool_] | None) -> NDArray[np.int32]:
    """What each token but the last must predict: the next one, or -100 if not supervised.

    Args:
        tokens: ``[n + 1]``.
        supervised: ``[n + 1]``; None means all.
    """
    following = tokens[1:]
    if supervised is None:
        return following
    return np.where(supervised[1:], following, np.int32(IGNORED))
