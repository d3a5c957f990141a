"""WeightSource: a checkpoint's tensors by canonical name, read one at a time.

Every file format implements it (`safetensors`, `mlx_layout`, `gguf_read`), every consumer takes
it (backends, conversion, verification). Nothing may load all tensors at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from qwen2kit.errors import WeightError
from qwen2kit.weights.tensor import DType, HostTensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype and shape of a tensor as `WeightSource.read` would return it."""

    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AffineTensor:
    """A weight in MLX affine quantisation: ``w = scale * q + bias`` per group along the last dim.

    Attributes:
        packed: uint32 ``[out, in * bits / 32]``, lowest bits first.
        scales: ``[out, in / group_size]`` in a float dtype.
        biases: like ``scales``.
        bits: 2, 3, 4, 6 or 8.
        group_size: elements that share a scale (32, 64 or 128).
    """

    packed: HostTensor
    scales: HostTensor
    biases: HostTensor
    bits: int
    group_size: int


@runtime_checkable
class WeightSource(Protocol):
    """Random access to tensors by canonical name."""

    def names(self) -> tuple[str, ...]:
        """Canonical names, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without reading data. Raises WeightError for an unknown name."""
        ...

    def read(self, name: str) -> HostTensor:
        """The dense tensor; quantised storage is dequantised. Raises WeightError if unknown."""
        ...

    def affine(self, name: str) -> AffineTensor | None:
        """The packed form when it is stored in MLX affine quantisation, else None."""
        ...


class MemorySource:
    """A WeightSource over tensors already in memory (exports, tests)."""

    def __init__(self, tensors: Mapping[str, HostTensor]) -> None:
        self._tensors = dict(tensors)

    @classmethod
    def collect(cls, items: Iterator[tuple[str, HostTensor]]) -> MemorySource:
        """Gather a streamed export."""
        return cls(dict(items))

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.read(name)
        return TensorInfo(tensor.dtype, tensor.shape)

    def read(self, name: str) -> HostTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise WeightError(f"no tensor named {name!r}") from None

    def affine(self, name: str) -> AffineTensor | None:
        return None
