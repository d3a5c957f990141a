"""Token shards for reading: documents by number and tokens by place, little of them in memory.

Offsets are memory-mapped (a search touches a few pages). Tokens are read with one ``pread`` per
span instead: a map would fault page by page, count every page against the process, and end it with
a bus error where a file is cut off.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from qwen2kit.data.packing import Span
from qwen2kit.data.shard_format import (
    ShardIndex,
    ShardInfo,
    Task,
    check_sizes,
    read_index,
    tokenizer_digest,
)
from qwen2kit.errors import DataError
from qwen2kit.tokenizer.bpe import Tokenizer

_OPEN_SHARDS = 128  # three descriptors each; systems allow 1,024 by default


class Shard:
    """One open shard.

    Args:
        vocab_size: ids from here on are damage.

    Attributes:
        offsets: int64 ``[documents + 1]``, memory-mapped.
    """

    def __init__(self, directory: Path, info: ShardInfo, dtype: str, vocab_size: int) -> None:
        self._base = directory / info.name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._vocab_size = vocab_size
        self._tokens = _open(self, self._base.with_suffix(".tokens"))
        self._bits = None
        if "supervised" in info.sha256:
            self._bits = _open(self, self._base.with_suffix(".supervised"))
        path = self._base.with_suffix(".offsets")
        try:
            mapped = np.memmap(path, dtype="<i8", mode="r", shape=(info.documents + 1,))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        self.offsets: NDArray[np.int64] = np.asarray(mapped)

    def span(self, start: int, stop: int) -> Span:
        """Tokens ``start:stop`` as int32; the second item is None if all are supervised.

        Raises:
            DataError: the file is cut off, cannot be read, or holds ids that no tokenizer made.
        """
        width = self._dtype.itemsize
        data = self._read(self._tokens, ".tokens", start * width, (stop - start) * width)
        stored = np.frombuffer(data, dtype=self._dtype)
        if stored.max(initial=0) >= self._vocab_size:
            raise self.damage(".tokens", f"holds the id {stored.max()}, which no token has")
        tokens = stored.astype(np.int32)
        if self._bits is None:
            return tokens, None
        first = start // 8
        packed = self._read(self._bits, ".supervised", first, -(-stop // 8) - first)
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
        return tokens, bits[start - 8 * first : stop - 8 * first].astype(np.bool_)

    def damage(self, suffix: str, problem: str) -> DataError:
        """An error that names one of the shard's files."""
        return DataError(f"{self._base}{suffix} {problem}; check it with `qwen2kit data verify`")

    def _read(self, descriptor: int, suffix: str, offset: int, count: int) -> bytes:
        try:
            data = os.pread(descriptor, count, offset)
        except OSError as error:
            raise DataError(f"{self._base}{suffix} cannot be read: {error.strerror}") from None
        if len(data) != count:
            raise self.damage(suffix, "ends too early")
        return data


def _open(owner: Shard, path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


@dataclass(frozen=True, slots=True)
class _Directory:
    path: Path
    index: ShardIndex


class ShardSet:
    """The shards of some directories as one, opened when needed and closed when many are open.

    Args:
        directories: made by ``qwen2kit data tokenize``.
        task: what they must have been made for.
        tokenizer: what must have made them; None accepts any.

    Raises:
        DataError: a directory is none of shards, unfinished, damaged, made for the other task or
            with another tokenizer.
    """

    def __init__(
        self, directories: list[Path], task: Task | None, tokenizer: Tokenizer | None
    ) -> None:
        self._directories = [_Directory(path, read_index(path)) for path in directories]
        for directory in self._directories:
            _check(directory, task, tokenizer)
        self._places = [
            (directory, info)
            for directory in self._directories
            for info in directory.index.shards
            if info.documents
        ]
        self._vocab_size = tokenizer.vocab_size if tokenizer is not None else 1 << 31
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of shards that hold documents."""
        return len(self._places)

    def __getitem__(self, number: int) -> Shard:
        """An open shard; whoever holds it keeps it open."""
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                directory, info = self._places[number]
                dtype, vocab_size = directory.index.dtype, self._vocab_size
                shard = self._open[number] = Shard(directory.path, info, dtype, vocab_size)
            self._open.move_to_end(number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard

    @cached_property
    def documents_before(self) -> NDArray[np.int64]:
        """Documents in earlier shards, int64 ``[shards + 1]``."""
        return _sums([info.documents for _, info in self._places])

    @cached_property
    def pairs_before(self) -> NDArray[np.int64]:
        """Pairs of input and label in earlier shards, int64 ``[shards + 1]``."""
        return _sums([info.tokens - info.documents for _, info in self._places])

    def describe(self, number: int) -> str:
        """The shard's path without suffix."""
        directory, info = self._places[number]
        return str(directory.path / info.name)

    def fingerprint(self) -> str:
        """Digest of all indices."""
        return " ".join(directory.index.fingerprint() for directory in self._directories)


def find_directories(patterns: tuple[str, ...]) -> list[Path]:
    """Directories matching ``patterns``, those of one pattern sorted, without repetition.

    Raises:
        DataError: a pattern matches no directory.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        exact = Path(pattern).expanduser()
        matches = [exact] if exact.is_dir() else sorted(map(Path, glob(str(exact))))
        matches = [path for path in matches if path.is_dir()]
        if not matches:
            raise DataError(f"no directory matches {pattern!r}; check data.paths")
        found |= dict.fromkeys(matches)
    return list(found)


def _sums(counts: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _check(directory: _Directory, task: Task | None, tokenizer: Tokenizer | None) -> None:
    path, index = directory.path, directory.index
    if task is not None and index.task != task:
        raise DataError(
            f"{path} was tokenised for task {index.task}, but the recipe's is {task}; "
            f"tokenise the data again with task={task}"
        )
    if tokenizer is not None and index.tokenizer != tokenizer_digest(tokenizer, index.task):
        template = " or chat template" if index.task == "sft" else ""
        raise DataError(
            f"{path} was made with another tokenizer{template} than the model's; tokenise the data "
            "again with the model's, or set model.tokenizer to its tokenizer directory"
        )
    check_sizes(path, index)
