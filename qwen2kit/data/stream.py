"""Rows of files that are tokenised while training: shuffled in blocks, resumable to the row.

The files of an epoch, in a shuffled order, make one sequence of documents, which is cut into rows
(as in `qwen2kit.data.windows`). A block is ``shuffle_rows`` of them, permuted. To go on exactly it
takes where the block begins (file, row, pair within the document) and how many of its rows have
been taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import TokenBatch
from qwen2kit.config.data_tree import FileData
from qwen2kit.data.background import Background
from qwen2kit.data.encode import encode_documents
from qwen2kit.data.packing import Span, empty_rows
from qwen2kit.data.permute import KeyedPermutation
from qwen2kit.data.row_source import RowLayout, State, join
from qwen2kit.data.rows import Part, expand, read_part
from qwen2kit.data.windows import count_pairs, fill_window
from qwen2kit.errors import DataError
from qwen2kit.tokenizer.bpe import Tokenizer

_BATCHES_AHEAD = 64  # of at most 256 Ki characters each
_PROBE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A pair of input and label in the files.

    Attributes:
        epoch: pass over the files.
        block: number of the block that begins here, within the epoch.
        file: number of the file in the epoch's order.
        row: number of the document's row in that file; 0 is before the first.
        pair: number of the pair within the document.
    """

    epoch: int = 0
    block: int = 0
    file: int = 0
    row: int = 0
    pair: int = 0


@dataclass(frozen=True, slots=True)
class _Document:
    """Tokens int32 ``[n]`` of one row; its place is ``(file, row)``."""

    place: tuple[int, int]
    tokens: NDArray[np.int32]


_EndOfEpoch = None


@dataclass(frozen=True, slots=True)
class _Block:
    """`Documents` in memory, laid out as rows, and the places where they begin and end."""

    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    rows: int
    order: KeyedPermutation
    start: Place
    next: Place

    def span(self, start: int, stop: int) -> Span:
        return self.tokens[start:stop], None


class StreamedRows:
    """A `RowSource` over text, JSON or Parquet files; documents only, always packed.

    Args:
        data: with ``stream`` set.
        layout: of the rows.

    Raises:
        DataError: a pattern matches no file.
    """

    table = None

    def __init__(self, data: FileData, tokenizer: Tokenizer, layout: RowLayout) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._layout = layout
        self._paths = expand(data.paths)
        self._start = Place()
        self._taken = 0
        self._block: _Block | None = None
        self._blocks: Iterator[_Block] | None = None
        self._batches: Background[list[_Document] | None] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        return self._start.epoch

    def take(self, count: int, mine: range) -> TokenBatch:
        parts, before = [], 0
        while before < count:
            block = self._current()
            taken = min(count - before, block.rows - self._taken)
            start, stop = (max(0, min(end - before, taken)) for end in (mine.start, mine.stop))
            parts.append(self._fill(block, range(self._taken + start, self._taken + stop)))
            before, self._taken = before + taken, self._taken + taken
            if self._taken == block.rows:
                self._block, self._start, self._taken = None, block.next, 0
        return join(parts)

    def state(self) -> State:
        return {**asdict(self._start), "taken": self._taken}

    def restore(self, state: State) -> None:
        place = dict(state)
        taken = place.pop("taken")
        self.close()
        self._start, self._taken = Place(**place), taken
        if not taken < self._current().rows:
            raise DataError(
                "the place where the run stopped does not exist: the recipe now makes other rows "
                "of the data; undo the change of seq_len, shuffle_rows or data"
            )

    def fingerprint(self) -> str:
        """Digest of the recipe node and of each file's name, size, beginning and end."""
        digest = sha256(json.dumps(asdict(self._data), sort_keys=True).encode())
        for path in self._paths:
            digest.update(_probe(path))
        return digest.hexdigest()

    def close(self) -> None:
        """Stop tokenising ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._blocks = self._block = None

    def _current(self) -> _Block:
        if self._blocks is None:
            documents = _encode_from(
                self._start, self._data, self._paths, self._tokenizer, self._layout.seed
            )
            self._batches = Background(documents, _BATCHES_AHEAD)
            self._blocks = self._cut(self._batches, self._start)
        if self._block is None:
            self._block = next(self._blocks)
            self._start = self._block.start
        return self._block

    def _fill(self, block: _Block, numbers: range) -> TokenBatch:
        seq_len = self._layout.seq_len
        batch = empty_rows(len(numbers), seq_len, self._layout.pad_id)
        pairs = count_pairs(block)
        for row, number in enumerate(numbers):
            first = block.order[number] * seq_len
            fill_window(batch, row, 0, block, first, min(first + seq_len, pairs))
        return batch

    def _cut(self, batches: Iterator[list[_Document] | None], start: Place) -> Iterator[_Block]:
        """Blocks from ``start`` on, endlessly."""
        room = self._data.shuffle_rows * self._layout.seq_len
        place, gathered = start, 0
        pieces: list[NDArray[np.int32]] = []
        seen = start != Place(epoch=start.epoch)
        for document in _flat(batches):
            if document is _EndOfEpoch:
                if not seen:
                    paths = ", ".join(self._data.paths)
                    raise DataError(
                        f"the data holds no document ({paths}); check its paths and format"
                    )
                following = Place(epoch=place.epoch + 1)
                if pieces:
                    yield self._lay_out(pieces, place, following)
                start, place, pieces, gathered, seen = following, following, [], 0, False
                continue
            seen = True
            pair = start.pair if document.place == (start.file, start.row) else 0
            while pair < len(document.tokens) - 1:
                pieces.append(document.tokens[pair : pair + room - gathered + 1])
                count = len(pieces[-1]) - 1
                gathered, pair = gathered + count, pair + count
                if gathered == room:
                    file, row = document.place
                    number = place.block + 1
                    following = Place(
                        epoch=place.epoch, block=number, file=file, row=row, pair=pair
                    )
                    yield self._lay_out(pieces, place, following)
                    place, pieces, gathered = following, [], 0

    def _lay_out(self, pieces: list[NDArray[np.int32]], place: Place, after: Place) -> _Block:
        lengths = [len(piece) for piece in pieces]
        pairs = sum(lengths) - len(lengths)
        rows = -(-pairs // self._layout.seq_len)
        key = f"block {self._layout.seed} {place.epoch} {place.block}"
        return _Block(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            tokens=np.concatenate(pieces),
            rows=rows,
            order=KeyedPermutation(rows, key),
            start=place,
            next=after,
        )


def _encode_from(
    place: Place, data: FileData, paths: list[Path], tokenizer: Tokenizer, seed: int
) -> Iterator[list[_Document] | None]:
    """All documents from ``place`` on in batches, epoch after epoch; None ends an epoch."""
    epoch, first, skip = place.epoch, place.file, max(0, place.row - 1)
    while True:
        order = KeyedPermutation(len(paths), f"files {seed} {epoch}")
        for file in range(first, len(paths)):
            rows = read_part(data, Part(paths[order[file]]), skip)
            for batch in encode_documents(data, rows, tokenizer):
                yield [
                    _Document((file, row.number), np.array(tokens, dtype=np.int32))
                    for row, tokens in batch
                    if tokens
                ]
            skip = 0
        yield _EndOfEpoch
        epoch, first = epoch + 1, 0


def _flat(batches: Iterator[list[_Document] | None]) -> Iterator[_Document | None]:
    for batch in batches:
        if batch is _EndOfEpoch:
            yield _EndOfEpoch
        else:
            yield from batch


def _probe(path: Path) -> bytes:
    """Name, size, first and last bytes of a file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_PROBE_BYTES)
        file.seek(max(0, size - _PROBE_BYTES))
        return b"\0".join([path.name.encode(), str(size).encode(), head, file.read()])
