"""The process that tokenises: takes the next unit of work until there is none.

Units are handed out by a shared counter. A finished shard is announced by a small file beside it,
so nothing that a crash interrupts is taken for complete.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from qwen2kit.config.data_tree import FileData
from qwen2kit.data.encode import encode_conversations, encode_documents, messages_of
from qwen2kit.data.rows import read_part
from qwen2kit.data.shard_format import TOKENIZER_DIR, ShardInfo, Task
from qwen2kit.data.shard_write import ShardWriter
from qwen2kit.data.work_units import Unit
from qwen2kit.errors import DataError, Qwen2KitError
from qwen2kit.partial_file import sync_directory, write_text_atomically
from qwen2kit.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue
    from multiprocessing.sharedctypes import Synchronized, SynchronizedArray

_MASKED_BATCH = 64
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all workers are told.

    Attributes:
        directory: where shards go; it holds the tokenizer already.
        units: all units; unit ``i`` becomes shard ``i``.
        pending: numbers of those not done yet.
        dtype: of the tokens.
    """

    directory: Path
    data: FileData
    task: Task
    units: tuple[Unit, ...]
    pending: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Shared:
    """What workers and their parent have in common.

    Attributes:
        taken: how many of ``Work.pending`` have been taken.
        done: documents, tokens, input bytes and shards so far; the bytes of an unfinished shard
            are an estimate.
        errors: ``(message, exit code)`` of a worker that failed.
    """

    taken: Synchronized[int]
    done: SynchronizedArray[int]
    errors: SimpleQueue[tuple[str, int]]

    def add(self, documents: int = 0, tokens: int = 0, size: int = 0, shards: int = 0) -> None:
        """Count what was done."""
        with self.done.get_lock():
            for index, count in enumerate((documents, tokens, size, shards)):
                self.done[index] += count


def shard_name(number: int) -> str:
    """Five digits (more where that is not enough)."""
    return f"{number:05d}"


def read_finished(directory: Path, number: int, unit: Unit) -> ShardInfo | None:
    """The shard that ``unit`` has become, or None if it is not finished or has changed since."""
    try:
        text = (directory / f"{shard_name(number)}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    note = json.loads(text)
    return ShardInfo(**note["shard"]) if note["unit"] == unit.digest() else None


def _announce(directory: Path, info: ShardInfo, digest: str) -> None:
    text = json.dumps({"unit": digest, "shard": asdict(info)})
    write_text_atomically(directory / f"{info.name}.json", text + "\n")
    sync_directory(directory)


def run_worker(work: Work, shared: Shared) -> None:
    """Work until no unit is left; a failure is put into ``shared.errors`` (exit code 1)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends us
    Thread(target=_follow_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer = Tokenizer.from_dir(work.directory / TOKENIZER_DIR)
        while (number := _next(work, shared)) is not None:
            digest = work.units[number].digest()  # of the input as it is before it is read
            info = _make_shard(work, number, tokenizer, shared)
            _announce(work.directory, info, digest)
            shared.add(shards=1)
    except Qwen2KitError as error:
        shared.errors.put((str(error), error.exit_code))
        raise SystemExit(1) from None
    except OSError as error:
        reason = f"{error.strerror or error} in {work.directory}"
        shared.errors.put((reason, DataError.exit_code))
        raise SystemExit(1) from None


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _next(work: Work, shared: Shared) -> int | None:
    with shared.taken.get_lock():
        index = shared.taken.value
        if index == len(work.pending):
            return None
        shared.taken.value += 1
    return work.pending[index]


def _make_shard(work: Work, number: int, tokenizer: Tokenizer, shared: Shared) -> ShardInfo:
    unit, masked = work.units[number], work.task == "sft"
    rows = chain.from_iterable(read_part(work.data, part) for part in unit.parts)
    batches = _masked(work.data, rows, tokenizer) if masked else _plain(work.data, rows, tokenizer)
    name, left = shard_name(number), unit.size
    with ShardWriter(work.directory, name, work.dtype, masked=masked) as writer:
        for documents, masks, empty in batches:
            writer.add(documents, masks)
            writer.empty += empty
            tokens = sum(map(len, documents))
            size = min(_BYTES_PER_TOKEN * tokens, left)
            left -= size
            shared.add(len(documents), tokens, size)
        info = writer.finish()
    shared.add(size=left)
    return info


_Batch = tuple[list[list[int]], list[list[bool]] | None, int]
"""Documents, masks, and how many rows had no text."""


def _plain(data: FileData, rows: Iterator[Any], tokenizer: Tokenizer) -> Iterator[_Batch]:
    for batch in encode_documents(data, rows, tokenizer):
        documents = [tokens for _, tokens in batch if tokens]
        yield documents, None, len(batch) - len(documents)


def _masked(data: FileData, rows: Iterator[Any], tokenizer: Tokenizer) -> Iterator[_Batch]:
    documents: list[list[int]] = []
    masks: list[list[bool]] = []
    for _, tokens, supervised in encode_conversations(messages_of(data, rows), tokenizer):
        documents.append(tokens)
        masks.append(supervised)
        if len(documents) == _MASKED_BATCH:
            yield documents, masks, 0
            documents, masks = [], []
    yield documents, masks, 0
