"""Batches in a deterministic order, resumable to the row, sharded by rank.

Rows form one endless stream, epoch after epoch; a batch is the next ``batch_rows`` rows of it,
and a rank takes its contiguous share. The state is therefore two integers and independent of the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.data.corpus import Corpus, permutation
from qwen2kit.data.packing import Plan, fill_rows, plan_rows
from qwen2kit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How rows are made.

    Attributes:
        seq_len: tokens per row.
        batch_rows: rows per batch over all ranks; a multiple of ``world``.
        seed: of the shuffle.
        pad_id: token that fills rows; never supervised, never attended to.
        packing: share rows among examples.
        split: cut examples at the row's end (documents) instead of keeping them whole.
        rank, world: this process and how many there are.
    """

    seq_len: int
    batch_rows: int
    seed: int
    pad_id: int
    packing: bool = True
    split: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_rows % self.world:
            raise ConfigError(
                f"batch_rows={self.batch_rows} is not a multiple of the {self.world} processes"
            )


class Loader:
    """Endless batches of ``corpus``.

    Attributes:
        epoch: epoch of the next row.
        row: its index within the epoch.
    """

    def __init__(self, corpus: Corpus, config: LoaderConfig) -> None:
        self.corpus = corpus
        self.config = config
        self.epoch = 0
        self.row = 0
        self._planned: tuple[int, Plan] | None = None

    def next_batch(self) -> TokenBatch:
        """This rank's rows of the next batch, ``[batch_rows / world, seq_len]``."""
        config = self.config
        rows: Plan = []
        while len(rows) < config.batch_rows:
            plan = self._plan(self.epoch)
            taken = plan[self.row : self.row + config.batch_rows - len(rows)]
            rows += taken
            self.row += len(taken)
            if self.row == len(plan):
                self.epoch, self.row = self.epoch + 1, 0
        share = config.batch_rows // config.world
        mine = rows[config.rank * share : (config.rank + 1) * share]
        return fill_rows(self.corpus, mine, config.seq_len, config.pad_id)

    def first_rows(self, max_rows: int) -> Iterator[TokenBatch]:
        """This rank's share of the first ``max_rows`` rows of epoch 0, batch by batch, once each.

        Does not move the loader. The last batch may be shorter.
        """
        config = self.config
        plan = self._plan(0)[:max_rows][config.rank :: config.world]
        share = config.batch_rows // config.world
        for start in range(0, len(plan), share):
            rows = plan[start : start + share]
            yield fill_rows(self.corpus, rows, config.seq_len, config.pad_id)

    def rows_in(self, epoch: int) -> int:
        """Number of rows in ``epoch`` (all ranks)."""
        return len(self._plan(epoch))

    def state(self) -> dict[str, int]:
        """Where the next batch starts, as JSON."""
        return {"epoch": self.epoch, "row": self.row}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        self.epoch, self.row = state["epoch"], state["row"]

    def fingerprint(self) -> str:
        """Digest of the data: resuming on other data is refused by comparing it."""
        return self.corpus.fingerprint()

    def close(self) -> None:
        """Stop what loads in the background; the loader is not used afterwards."""

    def _plan(self, epoch: int) -> Plan:
        if self._planned is None or self._planned[0] != epoch:
            order = permutation(len(self.corpus), self.config.seed, epoch)
            self._planned = (epoch, self._layout(order))
        return self._planned[1]

    def _layout(self, order: NDArray[np.int64]) -> Plan:
        return plan_rows(
            self.corpus.lengths,
            order,
            self.config.seq_len,
            packing=self.config.packing,
            split=self.config.split,
        )
