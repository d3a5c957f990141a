"""Rows of token shards: windows in a computed order, or whole conversations by their lengths."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import TokenBatch
from qwen2kit.data.packing import Span, empty_rows
from qwen2kit.data.permute import KeyedPermutation
from qwen2kit.data.row_source import RowLayout
from qwen2kit.data.shards import Shard, ShardSet
from qwen2kit.data.windows import Disorder, fill_window
from qwen2kit.errors import DataError


class WindowRows:
    """A `RowTable`: rows of ``seq_len`` pairs cut from all documents, shuffled anew every epoch.

    Nothing is kept in memory but one number per shard; any row costs a search and a read.

    Args:
        shards: where the documents are.
        layout: of the rows.
        chosen: the windows to use, as a range of positions in a fixed shuffle of all of them;
            None is all. Disjoint ranges share no token to predict.
    """

    def __init__(self, shards: ShardSet, layout: RowLayout, chosen: range | None = None) -> None:
        self.layout = layout
        self._shards = shards
        self._pairs = int(shards.pairs_before[-1])
        windows = -(-self._pairs // layout.seq_len)
        self._chosen = range(windows) if chosen is None else chosen
        self._split = KeyedPermutation(max(1, windows), f"split {layout.seed}")

    def rows_in(self, epoch: int) -> int:
        return len(self._chosen)

    def rows(self, epoch: int, numbers: range) -> TokenBatch:
        batch = empty_rows(len(numbers), self.layout.seq_len, self.layout.pad_id)
        order = KeyedPermutation(len(self._chosen), f"epoch {self.layout.seed} {epoch}")
        for row, number in enumerate(numbers):
            self._fill(batch, row, self._split[self._chosen[order[number]]])
        return batch

    def fingerprint(self) -> str:
        chosen = f"{self._shards.fingerprint()} {self._chosen.start} {self._chosen.stop}"
        return sha256(chosen.encode()).hexdigest()

    def hold_out(self, fraction: float) -> tuple[WindowRows, WindowRows]:
        """A random ``fraction`` of the windows (at least one) apart: ``(train, held_out)``.

        Windows are cut from documents without regard to their ends, so both may hold parts of one
        document, never the same part.

        Raises:
            DataError: nothing is left to train on.
        """
        count = max(1, round(fraction * len(self._chosen)))
        if count >= len(self._chosen):
            raise DataError("eval.fraction leaves no row to train on; lower it")
        return (
            WindowRows(self._shards, self.layout, self._chosen[count:]),
            WindowRows(self._shards, self.layout, self._chosen[:count]),
        )

    def _fill(self, batch: TokenBatch, row: int, window: int) -> None:
        before = self._shards.pairs_before
        first = window * self.layout.seq_len
        last = min(first + self.layout.seq_len, self._pairs)
        column = 0
        while first < last:
            number = int(np.searchsorted(before, first, side="right")) - 1
            base, end = int(before[number]), min(last, int(before[number + 1]))
            shard = self._shards[number]
            try:
                fill_window(batch, row, column, shard, first - base, end - base)
            except Disorder:
                raise _out_of_order(shard) from None
            column, first = column + end - first, end


class ShardExamples:
    """Documents of shards as `Examples`: 16 bytes each in memory, the tokens on disk.

    Args:
        chosen: document numbers over all shards, int64 ``[examples]``.
        lengths: tokens used of each of them, int64 ``[examples]``.
    """

    def __init__(
        self, shards: ShardSet, chosen: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        self._shards = shards
        self._chosen = chosen
        self.lengths = lengths

    @classmethod
    def of(cls, shards: ShardSet) -> ShardExamples:
        """All documents. Raises DataError if a shard's offsets are damaged."""
        lengths = []
        for number in range(len(shards)):
            shard = shards[number]
            lengths.append(np.diff(shard.offsets))
            if (lengths[-1] < 1).any():
                raise _out_of_order(shard)
        count = int(shards.documents_before[-1])
        return cls(shards, np.arange(count), np.concatenate([*lengths, np.zeros(0, np.int64)]))

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, example: int, begin: int, count: int) -> Span:
        shard, document = self._place(example)
        start = int(self._shards[shard].offsets[document]) + begin
        return self._shards[shard].span(start, start + count)

    def select(self, indices: NDArray[np.int64]) -> ShardExamples:
        return ShardExamples(self._shards, self._chosen[indices], self.lengths[indices])

    def carries_loss(self, example: int) -> bool:
        """Whether any of the example's tokens is supervised."""
        _, supervised = self.read(example, 0, int(self.lengths[example]))
        return supervised is None or bool(supervised.any())

    def truncate(self, limit: int) -> ShardExamples:
        """Every example cut to ``limit`` tokens."""
        return ShardExamples(self._shards, self._chosen, np.minimum(self.lengths, limit))

    def describe(self, example: int) -> str:
        """Shard and document number, for messages."""
        shard, document = self._place(example)
        return f"{self._shards.describe(shard)}, document {document}"

    def fingerprint(self) -> str:
        digest = sha256(self._shards.fingerprint().encode())
        digest.update(self._chosen.astype("<i8").tobytes())
        digest.update(self.lengths.astype("<i8").tobytes())
        return digest.hexdigest()

    def _place(self, example: int) -> tuple[int, int]:
        number = int(self._chosen[example])
        before = self._shards.documents_before
        shard = int(np.searchsorted(before, number, side="right")) - 1
        return shard, number - int(before[shard])


def _out_of_order(shard: Shard) -> DataError:
    return shard.damage(".offsets", "holds places that do not follow each other")
