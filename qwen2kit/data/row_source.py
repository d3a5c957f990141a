"""Where a loader's rows come from: tables (any row, any time) and sources (one after the other)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import TokenBatch
from qwen2kit.data.corpus import hold_out, permutation
from qwen2kit.data.packing import Examples, Plan, fill_rows, plan_rows
from qwen2kit.errors import DataError

State = dict[str, Any]
"""A place in a source, as JSON: the same on every process and for every number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """How rows are made.

    Attributes:
        seq_len: tokens per row.
        seed: of the shuffle.
        pad_id: token that fills rows; never supervised, never attended to.
        packing: share rows among examples.
        split: cut examples at the row's end (documents) instead of keeping them whole.
    """

    seq_len: int
    seed: int
    pad_id: int
    packing: bool = True
    split: bool = False


class RowTable(Protocol):
    """Rows by number: an epoch's rows can be counted, and each made without the others.

    Attributes:
        layout: of the rows.
    """

    layout: RowLayout

    def rows_in(self, epoch: int) -> int:
        """Number of rows in ``epoch``."""
        ...

    def rows(self, epoch: int, numbers: range) -> TokenBatch:
        """Those rows of ``epoch``, ``[len(numbers), seq_len]``."""
        ...

    def fingerprint(self) -> str:
        """Digest of the data."""
        ...

    def hold_out(self, fraction: float) -> tuple[RowTable, RowTable]:
        """A random ``fraction`` apart: ``(train, held_out)``. Raises DataError if nothing is left
        to train on."""
        ...


class RowSource(Protocol):
    """An endless sequence of rows, epoch after epoch, and a place in it.

    Attributes:
        epoch: of the next row.
        table: the rows by number; None where only reading them in order tells what they are.
    """

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        ...

    @property
    def table(self) -> RowTable | None:
        """The rows by number, or None."""
        ...

    def take(self, count: int, mine: range) -> TokenBatch:
        """Move over the next ``count`` rows; the arrays of those at ``mine`` among them."""
        ...

    def state(self) -> State:
        """The place of the next row."""
        ...

    def restore(self, state: State) -> None:
        """Go to the place where `state` was taken. Raises DataError if there is no such place."""
        ...

    def fingerprint(self) -> str:
        """Digest of the data: resuming on other data is refused by comparing it."""
        ...

    def close(self) -> None:
        """Stop what works in the background."""
        ...


class TableSource:
    """The rows of a table, in the table's order."""

    def __init__(self, table: RowTable) -> None:
        if table.rows_in(0) == 0:
            raise DataError("the data makes no row to train on; check data.paths")
        self.table = table
        self.epoch = 0
        self._row = 0

    def take(self, count: int, mine: range) -> TokenBatch:
        parts, before = [], 0
        for epoch, numbers in self._advance(count):
            start, stop = (max(0, end - before) for end in (mine.start, mine.stop))
            parts.append(self.table.rows(epoch, numbers[start:stop]))
            before += len(numbers)
        return join(parts)

    def _advance(self, count: int) -> Iterator[tuple[int, range]]:
        while count:
            rows = self.table.rows_in(self.epoch)
            taken = min(count, rows - self._row)
            yield self.epoch, range(self._row, self._row + taken)
            count, self._row = count - taken, self._row + taken
            if self._row == rows:
                self.epoch, self._row = self.epoch + 1, 0

    def state(self) -> State:
        return {"epoch": self.epoch, "row": self._row}

    def restore(self, state: State) -> None:
        epoch, row = state["epoch"], state["row"]
        if not 0 <= row < self.table.rows_in(epoch):
            raise DataError(
                f"row {row} of epoch {epoch}, where the run stopped, does not exist: the recipe "
                "now makes other rows of the data; undo the change of seq_len or data"
            )
        self.epoch, self._row = epoch, row

    def fingerprint(self) -> str:
        return self.table.fingerprint()

    def close(self) -> None:
        """Nothing works in the background."""


class PlannedRows:
    """Rows of examples that are laid out anew for every epoch, from their lengths in memory."""

    def __init__(self, examples: Examples, layout: RowLayout) -> None:
        self._examples = examples
        self.layout = layout
        self._lengths = examples.lengths
        self._planned: tuple[int, Plan] | None = None

    def rows_in(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def rows(self, epoch: int, numbers: range) -> TokenBatch:
        plan, layout = self._plan(epoch), self.layout
        return fill_rows(
            self._examples, [plan[number] for number in numbers], layout.seq_len, layout.pad_id
        )

    def fingerprint(self) -> str:
        return self._examples.fingerprint()

    def hold_out(self, fraction: float) -> tuple[PlannedRows, PlannedRows]:
        train, held_out = hold_out(self._examples, fraction, self.layout.seed)
        return PlannedRows(train, self.layout), PlannedRows(held_out, self.layout)

    def _plan(self, epoch: int) -> Plan:
        planned = self._planned
        if planned is None or planned[0] != epoch:
            layout = self.layout
            order = permutation(len(self._examples), layout.seed, epoch)
            plan = plan_rows(
                self._lengths, order, layout.seq_len, packing=layout.packing, split=layout.split
            )
            planned = self._planned = (epoch, plan)
        return planned[1]


def join(parts: list[TokenBatch]) -> TokenBatch:
    """The rows of all ``parts`` below each other."""
    if len(parts) == 1:
        return parts[0]
    return TokenBatch(*(_stack(parts, name) for name in FIELDS))


FIELDS = ("tokens", "labels", "positions", "documents")


def _stack(parts: list[TokenBatch], name: str) -> NDArray[np.int32]:
    return np.concatenate([getattr(part, name) for part in parts])
