"""The GGUF container: metadata and tensor table, every length checked before it is believed.

Layout (little-endian): magic, version, tensor count, key-value count, key-values, tensor table,
padding to the alignment, tensor data. The library's reader builds an object per token string and
loops over claimed lengths; here a 0.5B model opens in a fraction of a second and a lying length
ends the read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import WeightError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One row of the tensor table.

    Attributes:
        type: GGML block type.
        shape: dimensions in row-major order (reversed from the file).
        begin: offset in the file.
        nbytes: length in the file.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufFile:
    """A GGUF file, memory-mapped.

    Args:
        path: the file.

    Attributes:
        fields: metadata as plain Python values.
        tensors: table by name, in file order.

    Raises:
        WeightError: not GGUF, an unsupported version or byte order, truncated, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        cursor = _Cursor(path, self._data)
        tensor_count, field_count = _read_head(cursor)
        self.fields = _read_fields(cursor, field_count)
        self.tensors = _read_tensors(cursor, tensor_count, self.fields)

    def data(self, name: str) -> memoryview:
        """Raw bytes of a tensor, a view into the map."""
        tensor = self.tensors[name]
        return self._data[tensor.begin : tensor.begin + tensor.nbytes]


class _Cursor:
    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def damaged(self, problem: str) -> WeightError:
        return WeightError(f"{self.path}: {problem}; download or write it again")

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self.data):
            raise self.damaged(f"truncated GGUF ({len(self.data)} bytes, {end} or more expected)")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("damaged GGUF (a string is not UTF-8)") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.damaged(f"damaged GGUF (unknown metadata type {kind})")

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            size = struct.calcsize("<" + code)
            return list(struct.unpack(f"<{count}{code}", self.take(count * size)))
        if kind == _STRING:
            self.require(count, 8)
            return [self.string() for _ in range(count)]
        raise self.damaged(f"damaged GGUF (array of unknown type {kind})")

    def require(self, count: int, at_least: int) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        if count * at_least > len(self.data) - self.position:
            raise self.damaged(f"truncated GGUF ({count} items announced, the file ends before)")


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise WeightError(f"{path}: not a GGUF file (too short); download it again")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise WeightError(f"{path}: cannot be read ({error.strerror})") from error


def _read_head(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4)) != b"GGUF":
        raise WeightError(
            f"{cursor.path}: named .gguf but is no GGUF file (wrong magic); check the file name "
            "or download it again"
        )
    version = cursor.number("I")
    if version not in (2, 3):
        raise WeightError(
            f"{cursor.path}: GGUF version {version} is not supported (2 and 3 little-endian are); "
            "convert it with current llama.cpp"
        )
    return cursor.number("Q"), cursor.number("Q")


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.require(count, 13)
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in fields:
            raise cursor.damaged(f"damaged GGUF (metadata key {key[:80]!r} occurs twice)")
        fields[key] = cursor.value(cursor.number("I"))
    return fields


def _read_tensors(cursor: _Cursor, count: int, fields: dict[str, Any]) -> dict[str, GgufTensor]:
    cursor.require(count, 24)
    rows: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > 4:
            raise cursor.damaged(f"damaged GGUF (tensor {name[:80]!r} has {dimensions} dimensions)")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        rows.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment % 8:
        raise cursor.damaged(f"damaged GGUF (alignment {alignment!r})")
    start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in rows:
        if name in tensors or offset % alignment:
            raise cursor.damaged(
                f"damaged GGUF (tensor {name[:80]!r} occurs twice or is misplaced)"
            )
        tensors[name] = _row(cursor, name, shape, kind, start + offset)
    _check_overlap(cursor, tensors)
    return tensors


def _row(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml = GGMLQuantizationType(kind)
    except ValueError as error:
        raise WeightError(
            f"{cursor.path}: tensor {name[:80]!r} has unknown block type {kind}; upgrade the gguf "
            "package or use another quantisation"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[ggml]
    if not shape or shape[-1] % block:
        raise cursor.damaged(f"damaged GGUF (tensor {name[:80]!r} has rows of broken blocks)")
    size = prod(shape) // block * block_bytes
    if begin + size > len(cursor.data):
        raise cursor.damaged(
            f"truncated GGUF (tensor {name[:80]!r} ends at byte {begin + size}, the file at "
            f"{len(cursor.data)})"
        )
    return GgufTensor(ggml, shape, begin, size)


def _check_overlap(cursor: _Cursor, tensors: dict[str, GgufTensor]) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin < end:
            raise cursor.damaged(f"damaged GGUF (tensor {name[:80]!r} overlaps another)")
        end = tensor.begin + tensor.nbytes
