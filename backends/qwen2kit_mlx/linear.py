"""Weight matrices as the model uses them: dense or packed, single or fused along the output rows.

Matrices that read the same input (q, k, v; gate, up) are merged at load time where that saves
launches (`Kernels.stacks`) and their formats agree; `dense_rows` undoes it for the export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from qwen2kit_mlx.kernels import Kernels, gated


class Matrix(Protocol):
    """A ``[out, in]`` weight with an optional bias ``[out]``."""

    bias: mx.array | None

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """``x [N, in] -> [N, out]``, added to ``onto`` if given."""
        ...

    def swiglu(self, x: mx.array) -> mx.array:
        """``[N, out / 2]``: the first half of the outputs gates the second."""
        ...

    def dense_rows(self, start: int, stop: int) -> mx.array:
        """Rows ``start:stop`` of the weight, dequantised."""
        ...

    def arrays(self) -> tuple[mx.array, ...]:
        """All stored arrays."""
        ...


class Dense:
    """A matrix stored in the compute dtype."""

    def __init__(self, kernels: Kernels, weight: mx.array, bias: mx.array | None = None) -> None:
        self.kernels, self.weight, self.bias = kernels, weight, bias
        self._turned = weight.T

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        if self.bias is None or onto is None:
            return self.kernels.linear(x, self._turned, self.bias if onto is None else onto)
        return onto + self.kernels.linear(x, self._turned, self.bias)

    def swiglu(self, x: mx.array) -> mx.array:
        return gated(self.kernels, self(x))

    def embed(self, tokens: mx.array) -> mx.array:
        """Rows of the weight: ``tokens [...] -> [..., in]``."""
        return self.weight[tokens]

    def dense_rows(self, start: int, stop: int) -> mx.array:
        return self.weight[start:stop]

    def arrays(self) -> tuple[mx.array, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class Affine:
    """A matrix kept packed in MLX affine quantisation (see `qwen2kit.weights.source`)."""

    def __init__(
        self,
        kernels: Kernels,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
        bias: mx.array | None = None,
    ) -> None:
        self.kernels, self.weight, self.bias = kernels, weight, bias
        self.bits, self.group_size = bits, group_size
        kernels.expect(weight, bits, group_size)

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        return self.kernels.affine_linear(
            x, self.weight, self.bits, self.group_size, self.bias, onto
        )

    def swiglu(self, x: mx.array) -> mx.array:
        if self.bias is not None:
            return gated(self.kernels, self(x))
        return self.kernels.affine_swiglu(x, self.weight, self.bits, self.group_size)

    def embed(self, tokens: mx.array) -> mx.array:
        """Rows of the weight: ``tokens [...] -> [..., in]``."""
        return self._dequantize(*(part[tokens] for part in self.weight))

    def dense_rows(self, start: int, stop: int) -> mx.array:
        return self._dequantize(*(part[start:stop] for part in self.weight))

    def arrays(self) -> tuple[mx.array, ...]:
        return self.weight if self.bias is None else (*self.weight, self.bias)

    def _dequantize(self, packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(packed, scales, biases, self.group_size, self.bits)


Single = Dense | Affine


class Stacked:
    """Matrices that share an input but are stored apart, applied one after the other."""

    bias: mx.array | None = None

    def __init__(self, parts: Sequence[Single], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = tuple(parts), tuple(sizes)

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        y = mx.concatenate([part(x) for part in self.parts], axis=-1)
        return y if onto is None else onto + y

    def swiglu(self, x: mx.array) -> mx.array:
        return gated(self.parts[0].kernels, self(x))

    def dense_rows(self, start: int, stop: int) -> mx.array:
        offset = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            if start == offset and stop == offset + size:
                return part.dense_rows(0, size)
            offset += size
        raise IndexError(f"rows {start}:{stop} are not one of the stacked matrices")

    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(array for part in self.parts for array in part.arrays())
