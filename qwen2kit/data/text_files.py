"""Opening text: plain or compressed (``.gz``, ``.zst``), whole or from one byte to another."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qwen2kit.errors import DataError, MissingExtra

COMPRESSED = (".gz", ".zst")
_BUFFER = 1 << 20


def is_compressed(path: Path) -> bool:
    """Whether the name says so; such a file can only be read from its beginning."""
    return path.suffix.lower() in COMPRESSED


@contextmanager
def open_text(path: Path, start: int = 0, stop: int | None = None) -> Iterator[io.TextIOBase]:
    """UTF-8 text of the bytes ``start:stop`` (a byte order mark at the beginning is dropped).

    Raises:
        DataError: the file is missing, not UTF-8 or not decompressible; the message names it.
        MissingExtra: ``.zst`` without pyarrow.
    """
    encoding = "utf-8" if start else "utf-8-sig"
    try:
        raw = _open_bytes(path)
        with raw:
            if start:
                raw.seek(start)
            limited = raw if stop is None else _Limited(raw, stop - start)
            buffered = io.BufferedReader(cast(io.RawIOBase, limited), _BUFFER)
            with io.TextIOWrapper(buffered, encoding=encoding) as text:
                yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a complete {path.suffix} file: {error}") from None
    except OSError as error:
        if error.errno is None:  # a decompressor's complaint, not the system's
            raise DataError(f"{path} is not a readable {path.suffix} file: {error}") from None
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _open_bytes(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise MissingExtra("torch", "pyarrow") from None
        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb", buffering=0)


class _Limited(io.RawIOBase):
    """The next ``count`` bytes of a file."""

    def __init__(self, file: BinaryIO, count: int) -> None:
        self._file = file
        self._left = count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")[: self._left]  # type: ignore[arg-type]
        data = self._file.read(len(view))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)
