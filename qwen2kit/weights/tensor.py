"""HostTensor: a dense tensor in host memory with a dtype NumPy may not know (bfloat16).

It is the only currency in which weights cross between files, core and backends. The buffer is
usually a view into a memory-mapped file, so holding a HostTensor costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from qwen2kit.errors import WeightError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

DType = Literal[
    "float32", "float16", "bfloat16", "float64", "int8", "int32", "int64", "uint32", "uint8"
]
FLOAT_DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")

ITEM_SIZE: dict[DType, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "uint32": 4, "int8": 1, "uint8": 1,
}  # fmt: skip
_CAST_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A C-contiguous little-endian tensor.

    Attributes:
        dtype: element type; ``bfloat16`` is stored as its 16 raw bits.
        shape: dimensions.
        data: exactly ``prod(shape) * itemsize`` bytes; may be a read-only memory map.
        origin: the safetensors file and the name in it whose bytes these are, for frameworks that
            read files themselves; None for anything else.

    Raises:
        WeightError: the buffer's length does not match dtype and shape.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: memoryview
    origin: tuple[Path, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        expected = prod(self.shape) * ITEM_SIZE[self.dtype]
        if self.data.nbytes != expected:
            raise WeightError(
                f"tensor of {self.dtype} {list(self.shape)} needs {expected} bytes, "
                f"got {self.data.nbytes}"
            )

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self.data.nbytes

    def raw(self) -> NDArray[np.generic]:
        """Zero-copy NumPy view; bfloat16 appears as uint16 bits."""
        import numpy as np

        dtype = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        return np.frombuffer(self.data, dtype=dtype).reshape(self.shape)

    def float32(self) -> NDArray[np.float32]:
        """Values as float32 ``[*shape]``; exact for every float dtype but float64."""
        import numpy as np

        raw = self.raw()
        if self.dtype == "bfloat16":
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return np.asarray(raw, dtype=np.float32)

    def astype(self, dtype: DType) -> HostTensor:
        """The same values rounded to nearest-even in ``dtype`` (float dtypes only).

        Works in slices, so that the extra memory is little more than the result.
        """
        if dtype == self.dtype:
            return self
        import numpy as np

        flat = HostTensor(self.dtype, (prod(self.shape),), self.data)
        out = np.empty(flat.shape[0] * ITEM_SIZE[dtype], dtype=np.uint8)
        for start in range(0, flat.shape[0], _CAST_ELEMENTS):
            part = from_float32(flat.slice(start, start + _CAST_ELEMENTS).float32(), dtype)
            begin = start * ITEM_SIZE[dtype]
            out[begin : begin + part.nbytes] = np.frombuffer(part.data, dtype=np.uint8)
        return HostTensor(dtype, self.shape, out.data)

    def slice(self, begin: int, end: int) -> HostTensor:
        """Rows ``begin:end`` of the first dimension, without copying."""
        end = min(end, self.shape[0])
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        data = self.data[begin * row : end * row]
        return HostTensor(self.dtype, (end - begin, *self.shape[1:]), data)


def from_numpy(array: NDArray[np.generic]) -> HostTensor:
    """Wrap a NumPy array (any dtype in `DType` but bfloat16) without copying if contiguous."""
    import numpy as np

    contiguous = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    name = contiguous.dtype.name
    if name not in ITEM_SIZE:
        raise WeightError(f"NumPy dtype {name} has no tensor dtype")
    return HostTensor(name, array.shape, contiguous.reshape(-1).view(np.uint8).data)


def from_bits(bits: NDArray[np.uint16]) -> HostTensor:
    """Wrap raw bfloat16 bits (uint16 array) as a bfloat16 tensor."""
    import numpy as np

    flat = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    return HostTensor("bfloat16", bits.shape, flat.data)


def from_float32(values: NDArray[np.float32], dtype: DType) -> HostTensor:
    """Round float32 values to ``dtype`` (nearest even; NaN stays NaN).

    Raises:
        WeightError: ``dtype`` is not a float dtype, or a finite value overflows float16.
    """
    import numpy as np

    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "float32":
        return from_numpy(values)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if (np.isinf(half) & np.isfinite(values)).any():
            raise WeightError("values overflow float16; use bfloat16 or float32")
        return from_numpy(half)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = np.isnan(values)
        if nan.any():
            rounded = np.where(nan, 0x7FC0, rounded)
        return from_bits(rounded.astype(np.uint16))
    raise WeightError(f"cannot round to {dtype}; use one of {', '.join(FLOAT_DTYPES)}")
