"""Memory-mapped safetensors reading with strict validation of hostile or damaged headers.

The library's NumPy front end cannot represent bfloat16, so the format is read here: 8 bytes header
length (little-endian), a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data.
Nothing of a file is trusted before the whole header has been checked against the file's size.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qwen2kit.errors import WeightError
from qwen2kit.weights.source import AffineTensor, TensorInfo
from qwen2kit.weights.tensor import DType, HostTensor

MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, DType] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "U32": "uint32",
}  # fmt: skip
_ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One ``.safetensors`` file as a WeightSource; tensors are views into a memory map.

    Args:
        path: the file.

    Raises:
        WeightError: the file is truncated, not safetensors, or its header lies; one line that
            names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data, header = _map(path)
        self.metadata, self._entries = _parse_header(path, header)
        _check_layout(path, self._entries, len(self._data))

    def names(self) -> tuple[str, ...]:
        """Tensor names in file order."""
        return tuple(self._entries)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape; WeightError for an unknown name or a dtype without a use here."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise WeightError(
                f"{self.path.name}: tensor {name!r} has dtype {entry.dtype}, which is not "
                f"supported (supported: {', '.join(DTYPES)}); convert from the original weights"
            )
        return TensorInfo(DTYPES[entry.dtype], entry.shape)

    def read(self, name: str) -> HostTensor:
        """The tensor as a view into the map."""
        info, entry = self.info(name), self._entry(name)
        data = self._data[entry.begin : entry.end]
        return HostTensor(info.dtype, info.shape, data, origin=(self.path, name))

    def affine(self, name: str) -> AffineTensor | None:
        """Always None: the plain format has no quantisation."""
        return None

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise WeightError(f"{self.path.name}: no tensor named {name!r}") from None


class SafetensorsSource:
    """Several safetensors files as one WeightSource.

    Args:
        files: opened files; no tensor name may occur twice.

    Raises:
        WeightError: two files hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[SafetensorsFile]) -> None:
        self.files = tuple(files)
        self._home: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.names():
                if name in self._home:
                    raise WeightError(
                        f"tensor {name!r} is in both {self._home[name].path.name} and "
                        f"{file.path.name}; remove the stale file"
                    )
                self._home[name] = file

    def names(self) -> tuple[str, ...]:
        """Tensor names, file by file."""
        return tuple(self._home)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without reading data."""
        return self._file(name).info(name)

    def read(self, name: str) -> HostTensor:
        """The tensor as a view into its file's map."""
        return self._file(name).read(name)

    def affine(self, name: str) -> AffineTensor | None:
        """Always None: the plain format has no quantisation."""
        return None

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._home[name]
        except KeyError:
            raise WeightError(f"no tensor named {name!r} in the checkpoint") from None


def _map(path: Path) -> tuple[memoryview, bytes]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise WeightError(f"{path}: not a safetensors file (only {size} bytes); {_AGAIN}")
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise WeightError(f"{path}: cannot be read ({error.strerror})") from error
    length = int.from_bytes(mapped[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise WeightError(
            f"{path}: not a safetensors file (header of {length} bytes, the limit is "
            f"{MAX_HEADER_BYTES}); {_AGAIN}"
        )
    if length > size - 8:
        raise WeightError(
            f"{path}: truncated (header of {length} bytes in a file of {size}); {_AGAIN}"
        )
    return mapped[8 + length :], bytes(mapped[8 : 8 + length])


_AGAIN = "download or write it again"


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _DuplicateKey) else "header is not valid JSON"
        raise WeightError(f"{path}: not a safetensors file ({reason}); {_AGAIN}") from error
    if not isinstance(document, dict):
        raise WeightError(f"{path}: not a safetensors file (header is no object); {_AGAIN}")
    metadata = document.pop("__metadata__", None)
    if metadata is None:  # MLX writes null where it has nothing to say
        metadata = {}
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise WeightError(f"{path}: __metadata__ must map strings to strings; {_AGAIN}")
    entries = {name: _parse_entry(path, name, entry) for name, entry in document.items()}
    order = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    return metadata, dict(order)


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(f"duplicate key {key[:80]!r} in the header")
        result[key] = value
    return result


def _parse_entry(path: Path, name: str, entry: object) -> _Entry:
    def refuse(problem: str) -> WeightError:
        return WeightError(f"{path}: damaged header, tensor {name[:80]!r} {problem}; {_AGAIN}")

    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise refuse(f"has unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape):
        raise refuse("has a shape that is not a list of non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("has data_offsets that are not two ascending integers")
    begin, end = offsets
    expected = prod(shape) * _ITEM_BITS[dtype] // 8
    if end - begin != expected:
        raise refuse(f"takes {end - begin} bytes, its dtype and shape need {expected}")
    return _Entry(dtype, tuple(shape), begin, end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, entries: dict[str, _Entry], size: int) -> None:
    position = 0
    for name, entry in entries.items():
        if entry.begin != position:
            problem = "overlaps its neighbour" if entry.begin < position else "follows a gap"
            raise WeightError(f"{path}: damaged header, tensor {name[:80]!r} {problem}; {_AGAIN}")
        position = entry.end
    if position > size:
        raise WeightError(
            f"{path}: truncated (tensors need {position} bytes, the file has {size}); {_AGAIN}"
        )
    if position < size:
        raise WeightError(
            f"{path}: {size - position} bytes after the last tensor belong to nothing; {_AGAIN}"
        )
