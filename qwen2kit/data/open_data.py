"""From a recipe's data node to rows, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qwen2kit.config.data_tree import AnyData, EmbeddedData, FileData, MixtureData, ShardData
from qwen2kit.data.encode import EncodeReport, encode_corpus
from qwen2kit.data.mixture import MixedRows, source_seed
from qwen2kit.data.row_source import PlannedRows, RowLayout, RowSource, RowTable, TableSource
from qwen2kit.data.shard_format import Task
from qwen2kit.data.shard_rows import ShardExamples, WindowRows
from qwen2kit.data.shards import ShardSet, find_directories
from qwen2kit.data.stream import StreamedRows
from qwen2kit.errors import ConfigError, DataError
from qwen2kit.tokenizer.bpe import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOpener:
    """How a run wants its rows.

    Attributes:
        layout: of the rows.
        too_long: ``refuse`` or ``truncate`` conversations longer than a row.
        note: is told what was left out, and when a source of a mixture starts its next epoch.
    """

    tokenizer: Tokenizer
    task: Task
    layout: RowLayout
    too_long: str
    note: Callable[[str], None]

    def source(self, data: AnyData) -> RowSource:
        """Rows one after the other.

        Raises:
            DataError: the data cannot be read or does not fit the run.
            ConfigError: it cannot be used in this way.
        """
        if isinstance(data, MixtureData):
            parts = [
                self._seeded(number).source(part.data) for number, part in enumerate(data.sources)
            ]
            weights = [part.weight for part in data.sources]
            return MixedRows(parts, weights, self.layout.seed, self.note)
        if isinstance(data, FileData) and data.stream:
            if not self.layout.packing:
                raise ConfigError("data.stream packs rows: remove it or packing = false")
            return StreamedRows(data, self.tokenizer, self.layout)
        return TableSource(self.table(data))

    def table(self, data: AnyData, *, held_out: bool = False) -> RowTable:
        """Rows by number, of anything but a mixture or a stream.

        Args:
            held_out: take the held-out split (embedded data only).

        Raises as `source`.
        """
        if isinstance(data, ShardData):
            return self._shards(data)
        assert isinstance(data, EmbeddedData | FileData)
        corpus, report = encode_corpus(
            data,
            self.tokenizer,
            task=self.task,
            seq_len=self.layout.seq_len,
            too_long=self.too_long,
            held_out=held_out,
        )
        self._tell(report)
        return PlannedRows(corpus, self.layout)

    def _shards(self, data: ShardData) -> RowTable:
        shards = ShardSet(find_directories(data.paths), self.task, self.tokenizer)
        if self.task == "pretrain" and self.layout.packing:
            return WindowRows(shards, self.layout)
        examples = ShardExamples.of(shards)
        return PlannedRows(self._fit(examples) if self.task == "sft" else examples, self.layout)

    def _fit(self, examples: ShardExamples) -> ShardExamples:
        limit = self.layout.seq_len + 1
        longer = np.flatnonzero(examples.lengths > limit)
        if len(longer) == 0:
            return examples
        if self.too_long == "refuse":
            first = int(longer[0])
            raise DataError(
                f"{examples.describe(first)}: {examples.lengths[first]} tokens do not fit "
                f"seq_len={self.layout.seq_len}; raise seq_len or set too_long=truncate"
            )
        cut = examples.truncate(limit)
        idle = [int(i) for i in longer if not cut.carries_loss(int(i))]
        self._tell(EncodeReport(truncated=len(longer), dropped=len(idle), rows=len(examples)))
        return cut.select(np.setdiff1d(np.arange(len(cut)), idle))

    def _seeded(self, number: int) -> DataOpener:
        seed = source_seed(self.layout.seed, number)
        return replace(self, layout=replace(self.layout, seed=seed))

    def _tell(self, report: EncodeReport) -> None:
        for text in report.notes():
            self.note(text)
