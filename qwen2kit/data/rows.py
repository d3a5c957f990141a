"""Rows of text, JSON and Parquet files, streamed file by file, each with its place for errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from qwen2kit.config.data_tree import FileData, JsonlData, RowFormat, TextData, TextFormat
from qwen2kit.data.text_files import open_text
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

    @property
    def place(self) -> str:
        """File and row number."""
        return f"{self.file}, row {self.number}"

    def error(self, problem: str) -> DataError:
        """A DataError that names this row."""
        return DataError(f"{self.place}: {problem}")


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file that can be read by itself.

    Attributes:
        start, stop: bytes of plain text and of JSON lines, row groups of Parquet; ``stop=None`` is
            the end of the file.
    """

    path: Path
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.path}, from byte {self.start} on" if self.start else str(self.path)


def read_rows(data: FileData) -> Iterator[Row]:
    """All rows of ``data``: patterns in the order given, their matches sorted.

    Raises:
        DataError: a pattern matches nothing, or a file cannot be read; the message names it.
        MissingExtra: Parquet or ``.zst`` without pyarrow.
    """
    for path in expand(data.paths):
        yield from read_part(data, Part(path))


def read_part(data: FileData, part: Part, skip: int = 0) -> Iterator[Row]:
    """The rows of ``part`` whose number exceeds ``skip``; numbers count from its beginning.

    Raises as `read_rows`.
    """
    if isinstance(data, TextData):
        return _text_rows(part, data.split, skip)
    if isinstance(data, JsonlData):
        return _json_rows(part, skip)
    return _parquet_rows(part, data.format, skip)


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


def _lines(part: Part) -> Iterator[str]:
    with open_text(part.path, part.start, part.stop) as file:
        yield from file


def _text_rows(part: Part, split: str, skip: int) -> Iterator[Row]:
    if split == "file":
        texts: Iterator[str] = iter(["".join(_lines(part))])
    elif split == "line":
        texts = (line.rstrip("\r\n") for line in _lines(part))
    else:
        texts = _paragraphs(_lines(part))
    for number, text in enumerate(texts, 1):
        if number > skip:
            yield Row(str(part), number, {"text": text})


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.strip():
            rest = takewhile(lambda other: bool(other.strip()), lines)
            yield "".join(chain([line], rest)).rstrip("\r\n")


def is_json_array(path: Path) -> bool:
    """Whether the file holds one array instead of an object per line."""
    with open_text(path) as file:
        while text := file.read(1024):
            if text.strip():
                return text.lstrip().startswith("[")
    return False


def _json_rows(part: Part, skip: int) -> Iterator[Row]:
    if part.start == 0 and is_json_array(part.path):
        yield from islice(_json_array(part.path), skip, None)
        return
    for number, line in enumerate(_lines(part), 1):
        if number > skip and line.strip():
            yield _object(str(part), number, _parse(str(part), number, line))


def _json_array(path: Path) -> Iterator[Row]:
    text = "".join(_lines(Part(path)))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: {_not_json(error)}") from None
    for number, value in enumerate(values, 1):
        yield _object(str(path), number, value)


def _parse(file: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}, row {number}: {_not_json(error)}") from None


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}"
    deep = isinstance(error, RecursionError)
    return "not valid JSON: nested too deeply" if deep else "holds a number of too many digits"


def _object(file: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{file}, row {number}: expected a JSON object, got {type(value).__name__}")
    return Row(file, number, value)


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``.

    Raises:
        DataError: the file cannot be read, now or within the block.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("torch", "pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable Parquet file: {reason}") from None


def _parquet_rows(part: Part, format: RowFormat, skip: int) -> Iterator[Row]:
    with open_parquet(part.path) as file:
        columns = None
        if isinstance(format, TextFormat) and format.column in file.schema_arrow.names:
            columns = [format.column]
        stop = file.num_row_groups if part.stop is None else part.stop
        number = 0
        for group in range(part.start, stop):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for batch in file.iter_batches(1024, row_groups=[group], columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield Row(_group_label(part), number, value)


def _group_label(part: Part) -> str:
    return f"{part.path}, from row group {part.start} on" if part.start else str(part.path)
