"""Input files cut into units of work: one shard each, the same whoever does the work.

Files are taken in order. Plain text and JSON lines are cut at the end of a line (of a paragraph
where that is what a document is), Parquet between row groups; everything else is one piece. Pieces
are gathered until a unit is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from qwen2kit.config.data_tree import FileData, JsonlData, ParquetData, TextData
from qwen2kit.data.rows import Part, expand, is_json_array, open_parquet
from qwen2kit.data.text_files import is_compressed


@dataclass(frozen=True, slots=True)
class Unit:
    """The input of one shard.

    Attributes:
        parts: what to read, in order.
        size: bytes of input (uncompressed row group sizes for Parquet).
    """

    parts: tuple[Part, ...]
    size: int

    def digest(self) -> str:
        """SHA-256 of its places and of the files' sizes and modification times: noticing a
        changed input without reading it."""
        digest = sha256()
        for part in self.parts:
            status = part.path.stat()
            place = (str(part.path), part.start, part.stop, status.st_size, status.st_mtime_ns)
            digest.update(repr(place).encode())
        return digest.hexdigest()


def plan_units(data: FileData, unit_bytes: int) -> list[Unit]:
    """All of ``data`` in units of about ``unit_bytes``; a piece that cannot be cut may exceed it.

    Raises:
        DataError: a pattern matches no file, or a file cannot be read.
    """
    units: list[Unit] = []
    parts: list[Part] = []
    size = 0
    for path in expand(data.paths):
        start, end = 0, _end(data, path)
        while start < end:
            stop, taken = _piece(data, path, start, end, unit_bytes - size)
            parts.append(Part(path, start, None if stop == end else stop))
            start, size = stop, size + taken
            if size >= unit_bytes:
                units.append(Unit(tuple(parts), size))
                parts, size = [], 0
    return [*units, Unit(tuple(parts), size)] if parts else units


def _end(data: FileData, path: Path) -> int:
    """Where the last piece stops: bytes, or row groups."""
    if isinstance(data, ParquetData):
        with open_parquet(path) as file:
            return int(file.num_row_groups)
    return path.stat().st_size


def _piece(data: FileData, path: Path, start: int, end: int, room: int) -> tuple[int, int]:
    """End and size of the piece of ``path`` from ``start`` that fills ``room`` bytes."""
    if isinstance(data, ParquetData):
        return _row_groups(path, start, end, room)
    if end - start <= room or not _can_be_cut(data, path):
        return end, end - start
    blank = isinstance(data, TextData) and data.split == "paragraph"
    stop = _line_end(path, start + room, end, blank=blank)
    return stop, stop - start


def _row_groups(path: Path, start: int, end: int, room: int) -> tuple[int, int]:
    size, stop = 0, start
    with open_parquet(path) as file:
        while stop < end and size < room:
            size += file.metadata.row_group(stop).total_byte_size
            stop += 1
    return stop, size


def _can_be_cut(data: FileData, path: Path) -> bool:
    if is_compressed(path):
        return False
    if isinstance(data, JsonlData):
        return not is_json_array(path)
    return isinstance(data, TextData) and data.split != "file"


def _line_end(path: Path, position: int, end: int, *, blank: bool) -> int:
    """Where the line with byte ``position - 1`` ends; with ``blank``, the next blank line."""
    with path.open("rb") as file:
        file.seek(position - 1)
        file.readline()
        while blank and (line := file.readline()) and line.strip():
            pass
        return min(file.tell(), end)
