"""Training text for the contamination check, whatever file it is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen2kit.config.data_tree import JsonlData, TextData
from qwen2kit.data.rows import expand, open_parquet, read_rows
from qwen2kit.data.shards import ShardSet
from qwen2kit.data.text_files import COMPRESSED
from qwen2kit.errors import ConfigError
from qwen2kit.tokenizer.bpe import Tokenizer

_JSON = (".jsonl", ".json")


def train_texts(paths: Sequence[str], tokenizer: str | None) -> Iterator[str]:
    """The training documents in ``paths``, streamed.

    A document is a paragraph of a text file, all text of a JSON or Parquet row (its strings joined
    by line ends), or a document of a directory of token shards.

    Args:
        paths: files, glob patterns, directories of shards.
        tokenizer: a model directory or GGUF file whose tokenizer made the shards.

    Raises:
        ConfigError: shards without ``tokenizer``.
        DataError: a pattern matches nothing, or a file cannot be read.
    """
    directories = [Path(path) for path in paths if Path(path).is_dir()]
    if directories and tokenizer is None:
        raise ConfigError(f"{directories[0]} holds token shards: add --tokenizer MODEL")
    files = [path for path in paths if not Path(path).is_dir()]
    return _texts(expand(tuple(files)), directories, tokenizer)


def _texts(files: list[Path], directories: list[Path], tokenizer: str | None) -> Iterator[str]:
    for file in files:
        suffixes = [s for s in file.suffixes if s.lower() not in COMPRESSED]
        kind = suffixes[-1].lower() if suffixes else ""
        if kind == ".parquet":
            yield from _parquet(file)
        elif kind in _JSON:
            for row in read_rows(JsonlData(paths=(str(file),))):
                yield "\n".join(_strings(row.value))
        else:
            for row in read_rows(TextData(paths=(str(file),), split="paragraph")):
                yield row.value["text"]
    if directories and tokenizer is not None:
        from qwen2kit.weights.checkpoint import open_checkpoint

        known = open_checkpoint(Path(tokenizer)).tokenizer()
        yield from _shards(ShardSet(directories, None, known), known)


def _parquet(file: Path) -> Iterator[str]:
    with open_parquet(file) as table:
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield "\n".join(_strings(row))


def _shards(shards: ShardSet, tokenizer: Tokenizer) -> Iterator[str]:
    for number in range(len(shards)):
        shard = shards[number]
        for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            tokens, _ = shard.span(int(start), int(stop))
            yield tokenizer.decode(tokens.tolist())


def _strings(value: Any) -> Iterator[str]:
    """All text inside a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
