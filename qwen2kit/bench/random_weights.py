"""Random weights of any spec without a file, so that anyone can repeat a speed measurement."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Final

import numpy as np

from qwen2kit.errors import WeightError
from qwen2kit.spec.schema import schema_by_name
from qwen2kit.weights.source import AffineTensor, TensorInfo
from qwen2kit.weights.tensor import DType, HostTensor, from_float32

if TYPE_CHECKING:
    from qwen2kit.spec.model import ModelSpec

_VALUES: Final = 1_048_573  # a prime: no two rows of a matrix begin at the same place
_SCALE: Final = 0.02


class RandomSource:
    """A `qwen2kit.weights.source.WeightSource` whose tensors are made when they are read.

    Matrices are cut from one endless repetition of the same million normal values (deviation
    0.02), which costs no more than a copy; norms are one and biases zero. The result computes at
    the speed of a trained model and says nothing sensible.

    Args:
        spec: the model.
        dtype: of every tensor.
    """

    def __init__(self, spec: ModelSpec, dtype: DType) -> None:
        self._params = schema_by_name(spec)
        self._dtype = dtype
        values = np.random.default_rng(0).standard_normal(_VALUES, dtype=np.float32) * _SCALE
        self._values = from_float32(values, dtype).raw()
        self._places = {name: 7919 * index % _VALUES for index, name in enumerate(self._params)}

    def names(self) -> tuple[str, ...]:
        """See `WeightSource`."""
        return tuple(self._params)

    def info(self, name: str) -> TensorInfo:
        """See `WeightSource`."""
        if name not in self._params:
            raise WeightError(f"no tensor named {name!r}")
        return TensorInfo(self._dtype, self._params[name].shape)

    def read(self, name: str) -> HostTensor:
        """See `WeightSource`."""
        shape = self.info(name).shape
        init = self._params[name].init
        if init != "normal":
            same = np.full(shape, init == "ones", dtype=np.float32)
            return from_float32(same, self._dtype)
        data = np.empty(prod(shape), dtype=self._values.dtype)
        turned = np.roll(self._values, -self._places[name])
        whole = len(data) // _VALUES * _VALUES
        data[:whole].reshape(-1, _VALUES)[:] = turned
        data[whole:] = turned[: len(data) - whole]
        return HostTensor(self._dtype, shape, data.view(np.uint8).data)

    def affine(self, name: str) -> AffineTensor | None:
        """None: nothing is quantised."""
        return None
