"""Rows cut from concatenated documents by arithmetic: row ``r`` without its predecessors.

A document of ``n`` tokens is ``n - 1`` pairs of input and label. Number the pairs of all documents
through; a row is ``seq_len`` consecutive ones. Document ``i`` begins at pair ``offsets[i] - i``,
so a binary search in the offsets finds the documents of a row, and nothing else is needed.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import TokenBatch
from qwen2kit.data.packing import Span, labels_of


class Documents(Protocol):
    """Documents one after the other.

    Attributes:
        offsets: int64 ``[documents + 1]``: document ``i`` is tokens ``offsets[i]:offsets[i + 1]``
            and at least one token long.
    """

    @property
    def offsets(self) -> NDArray[np.int64]:
        """First token of every document, and the number of tokens."""
        ...

    def span(self, start: int, stop: int) -> Span:
        """Tokens ``start:stop``."""
        ...


class Disorder(Exception):
    """Offsets do not follow each other."""


def count_pairs(documents: Documents) -> int:
    """Pairs of input and label in all documents."""
    count = len(documents.offsets) - 1
    return int(documents.offsets[count]) - count


def document_at(offsets: NDArray[np.int64], pair: int) -> int:
    """The document that ``pair`` lies in."""
    return bisect_right(range(len(offsets)), pair, key=lambda i: int(offsets[i]) - i) - 1


def fill_window(
    batch: TokenBatch, row: int, column: int, documents: Documents, first: int, last: int
) -> None:
    """Put pairs ``first:last`` into ``batch`` at ``row``, from ``column`` on.

    Positions restart at 0 in every document and at the cut; documents are numbered on from the
    one left of ``column``.

    Raises:
        Disorder: the offsets around the pairs are damaged.
    """
    offsets, count = documents.offsets, last - first
    begin, end = document_at(offsets, first), document_at(offsets, last - 1)
    # Every document before the token's own has one token more than it has pairs.
    start, stop = first + begin, last + end + 1
    around = offsets[begin : end + 2]
    if not (around[0] <= start < stop <= around[-1] and (np.diff(around) > 0).all()):
        raise Disorder
    tokens, supervised = documents.span(start, stop)
    keep = np.ones(len(tokens) - 1, dtype=np.bool_)
    keep[offsets[begin + 1 : end + 1] - 1 - start] = False  # the last of a document predicts none
    inner = offsets[begin + 1 : end + 1] - np.arange(begin + 1, end + 1) - first
    starts = np.concatenate([[0], inner])
    lengths = np.diff(np.concatenate([starts, [count]]))
    here = slice(column, column + count)
    number = int(batch.documents[row, column - 1]) + 1 if column else 0
    batch.tokens[row, here] = tokens[:-1][keep]
    batch.labels[row, here] = labels_of(tokens, supervised)[keep]
    batch.positions[row, here] = np.arange(count) - np.repeat(starts, lengths)
    batch.documents[row, here] = number + np.repeat(np.arange(len(starts)), lengths)
