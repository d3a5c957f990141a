"""Rows of text, JSON and Parquet files, streamed file by file, each with its place for errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from qwen2kit.config.data_tree import FileData, JsonlData, TextData
from qwen2kit.errors import DataError, MissingExtra


@dataclass(frozen=True, slots=True)
class Row:
    """One record.

    Attributes:
        file: where it came from.
        number: 1-based row (or line, or document) number in that file.
        value: its columns; plain text has the one column ``text``.
    """

    file: str
    number: int
    value: Mapping[str, Any]

    def error(self, problem: str) -> DataError:
        """A DataError that names this row."""
        return DataError(f"{self.file}, row {self.number}: {problem}")


def read_rows(data: FileData) -> Iterator[Row]:
    """All rows of ``data``: patterns in the order given, their matches sorted.

    Raises:
        DataError: a pattern matches nothing, or a file cannot be read; the message names it.
        MissingExtra: Parquet without pyarrow.
    """
    for path in expand(data.paths):
        if isinstance(data, TextData):
            yield from _text_rows(path, data.split)
        elif isinstance(data, JsonlData):
            yield from _json_rows(path)
        else:
            yield from _parquet_rows(path)


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """Files matching ``patterns``, without repetition.

    Raises:
        DataError: a pattern matches no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        exact = Path(pattern).expanduser()
        names = [str(exact)] if exact.is_file() else sorted(glob(str(exact), recursive=True))
        matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            raise DataError(f"no file matches {pattern!r}; check data.paths")
        found |= dict.fromkeys(matches)
    return list(found)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _text_rows(path: Path, split: str) -> Iterator[Row]:
    if split == "file":
        texts: Iterator[str] = iter(["".join(_lines(path))])
    elif split == "line":
        texts = (line.rstrip("\r\n") for line in _lines(path))
    else:
        texts = _paragraphs(_lines(path))
    for number, text in enumerate(texts, 1):
        yield Row(str(path), number, {"text": text})


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.strip():
            rest = takewhile(lambda other: bool(other.strip()), lines)
            yield "".join(chain([line], rest)).rstrip("\r\n")


def _json_rows(path: Path) -> Iterator[Row]:
    lines = _lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        yield from _json_array(path)
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _object(path, number, _parse(path, number, line))


def _json_array(path: Path) -> Iterator[Row]:
    try:
        values = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    for number, value in enumerate(values, 1):
        yield _object(path, number, value)


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{path}, row {number}: not valid JSON: {reason}") from None


def _object(path: Path, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {number}: expected a JSON object, got {type(value).__name__}")
    return Row(str(path), number, value)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("torch", "pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, value)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable Parquet file: {reason}") from None
