"""Batches in a deterministic order, resumable to the row, shared out among processes.

Rows form one endless stream; a batch is the next ``batch_rows`` rows of it, and a process takes
its contiguous share. The state is therefore independent of the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from qwen2kit.backend.values import TokenBatch
from qwen2kit.data.packing import empty_rows
from qwen2kit.data.row_source import RowSource, RowTable, State, join
from qwen2kit.errors import ConfigError


class Batches(Protocol):
    """What a training loop needs of a loader."""

    def next_batch(self) -> TokenBatch:
        """This process's rows of the next batch."""
        ...

    def state(self) -> State:
        """Where the next batch starts, as JSON; the same on every process."""
        ...

    def restore(self, state: State) -> None:
        """Continue where `state` was taken, with any number of processes."""
        ...

    def rows_in(self, epoch: int) -> int:
        """Number of rows in ``epoch`` (all processes). Raises ConfigError if unknown."""
        ...

    def fingerprint(self) -> str:
        """Digest of the data: resuming on other data is refused by comparing it."""
        ...

    def close(self) -> None:
        """Stop what works in the background; nothing is called afterwards."""
        ...


class Loader:
    """Endless batches of a source.

    Args:
        source: the rows.
        batch_rows: rows per batch over all processes; a multiple of their number.
        shard: ``(rank, world)``: this process and how many there are.

    Raises:
        ConfigError: ``batch_rows`` cannot be divided.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_rows: int,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        rank, world = shard
        if batch_rows % world:
            raise ConfigError(f"batch_rows={batch_rows} is not a multiple of the {world} processes")
        self._source = source
        self._batch_rows = batch_rows
        share = batch_rows // world
        self._mine = range(rank * share, (rank + 1) * share)

    def next_batch(self) -> TokenBatch:
        """This process's rows of the next batch, ``[batch_rows / world, seq_len]``."""
        return self._source.take(self._batch_rows, self._mine)

    def first_rows(self, max_rows: int) -> Iterator[TokenBatch]:
        """This process's share of the first ``max_rows`` rows of epoch 0, once each.

        Every process gets equally many batches of equal shape: missing rows are padding. Does not
        move the loader.
        """
        table, mine = self._table(), self._mine
        total = min(max_rows, table.rows_in(0))
        for start in range(0, total, self._batch_rows):
            numbers = range(min(start + mine.start, total), min(start + mine.stop, total))
            missing = len(mine) - len(numbers)
            padding = empty_rows(missing, table.layout.seq_len, table.layout.pad_id)
            yield join([table.rows(0, numbers), padding])

    def rows_in(self, epoch: int) -> int:
        """Number of rows in ``epoch`` (all processes)."""
        return self._table().rows_in(epoch)

    def state(self) -> State:
        return self._source.state()

    def restore(self, state: State) -> None:
        self._source.restore(state)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()

    def _table(self) -> RowTable:
        if self._source.table is None:
            raise ConfigError(
                "the rows of streamed or mixed data cannot be counted in advance: set train.steps "
                "instead of train.epochs, and eval.data instead of eval.fraction"
            )
        return self._source.table
