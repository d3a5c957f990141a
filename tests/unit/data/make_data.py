"""Small data for tests: a tokenizer, text and conversations in files, shards, sources of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.config.data_tree import (
    FileData,
    JsonlData,
    PromptResponseFormat,
    ShardData,
    TextData,
)
from qwen2kit.data.open_data import DataOpener
from qwen2kit.data.row_source import FIELDS, RowLayout
from qwen2kit.data.shard_format import ShardIndex, Task
from qwen2kit.data.tokenize_job import tokenize
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe

WORDS = tuple(
    [
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "and",
        "what",
        "this",
        "answer",
        "dog",
        "ran",
        "far",
        "away",
        "täglich",
        "你好",
        "12",
        "7",
    ]
)


@cache
def small_tokenizer(vocab_size: int = 290) -> Tokenizer:
    return train_bbpe([" ".join(WORDS), "system\nYou are a helpful assistant."] * 20, vocab_size)


def sentences(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """All different: each begins with its number."""
    rng = Random(seed)
    return [
        f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, longest)))
        for i in range(count)
    ]


def write_lines(path: Path, lines: list[str]) -> TextData:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return TextData(paths=(str(path),), split="line")


def write_chats(path: Path, count: int, seed: int = 0) -> JsonlData:
    rows = [{"prompt": a, "response": b[::-1]} for a, b in zip(
        sentences(count, seed), sentences(count, seed + 1), strict=True)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JsonlData(paths=(str(path),), format=PromptResponseFormat())


def make_shards(
    data: FileData,
    directory: Path,
    task: Task = "pretrain",
    *,
    workers: int = 1,
    shard_bytes: int = 4_000,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[Any], None] = lambda done: None,
) -> ShardIndex:
    return tokenize(
        data,
        tokenizer or small_tokenizer(),
        task,
        directory,
        workers=workers,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def opener(
    task: Task = "pretrain", seq_len: int = 16, too_long: str = "truncate", **changes: Any
) -> DataOpener:
    """Rows of ``seq_len``; the notes go into ``opener.note.__self__`` (a list)."""
    tokenizer = small_tokenizer()
    values = {"seed": 7, "pad_id": tokenizer.eot_id, "split": task == "pretrain", **changes}
    layout = RowLayout(seq_len=seq_len, **values)
    notes: list[str] = []
    return DataOpener(
        tokenizer=tokenizer, task=task, layout=layout, too_long=too_long, note=notes.append
    )


def shards_of(directory: Path) -> ShardData:
    return ShardData(paths=(str(directory),))


def rows_of(batch: TokenBatch) -> list[bytes]:
    """Every row as comparable bytes."""
    arrays = [getattr(batch, name) for name in FIELDS]
    return [b"".join(a[row].tobytes() for a in arrays) for row in range(len(batch.tokens))]


def pairs(batch: TokenBatch) -> list[tuple[int, int]]:
    """(input, label) of every position that is not padding."""
    inside = batch.documents >= 0
    return list(zip(batch.tokens[inside].tolist(), batch.labels[inside].tolist(), strict=True))


def stack(batches: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(
        *(np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS)
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory``, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
