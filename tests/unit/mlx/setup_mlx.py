"""What the MLX tests share: models on either kernel set, and a source in MLX quantisation."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from qwen2kit.spec.model import (
    LinearScaling,
    ModelSpec,
    RoPESpec,
    SlidingWindowSpec,
    YarnScaling,
)
from qwen2kit.weights.source import AffineTensor, MemorySource, TensorInfo, WeightSource
from qwen2kit.weights.tensor import HostTensor, from_numpy
from qwen2kit_mlx.compiled import MLXModel
from qwen2kit_mlx.cuda_kernels import CUDAKernels
from qwen2kit_mlx.host_kernels import HostKernels
from qwen2kit_mlx.kernels import Kernels, NativeKernels
from tests.conftest import small_spec

KERNELS: dict[str, Kernels] = {
    "native": NativeKernels(fuse=False),
    "cuda": CUDAKernels(fuse=False),
    "host": HostKernels(),
}
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64)
SPECS = {
    "tied": small_spec(),
    "untied": small_spec(tied=False),
    "multi-head": small_spec(num_key_value_heads=4),
    "wide heads": small_spec(head_dim=32),
    "yarn": small_spec(rope=RoPESpec(rope_theta=10_000.0, scaling=YARN)),
    "linear": small_spec(rope=RoPESpec(rope_theta=10_000.0, scaling=LinearScaling(factor=2.0))),
    "window": small_spec(
        window=SlidingWindowSpec(enabled=True, sliding_window=5, max_window_layers=1)
    ),
}


def model(
    spec: ModelSpec,
    weights: WeightSource,
    kernels: str = "native",
    dtype: mx.Dtype = mx.float32,
    device: mx.Device | None = None,
) -> MLXModel:
    """A loaded model; float32 on the CPU unless told otherwise."""
    made = MLXModel(
        spec, device or mx.Device(mx.cpu), dtype, KERNELS[kernels], spec.max_position_embeddings
    )
    made.load(weights)
    return made


class PackedSource:
    """``base`` with the matrices named in ``formats`` (name -> bits, group size) quantised by
    MLX itself, from values in ``dtype``, which scales then have too (given as float32); `read`
    gives MLX's own dequantised values."""

    def __init__(
        self,
        base: MemorySource,
        formats: dict[str, tuple[int, int]],
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        self._base, self._packed = base, {}
        for name, (bits, group_size) in formats.items():
            weight = mx.array(base.read(name).raw()).astype(dtype)
            packed, *rest = mx.quantize(weight, group_size, bits)
            parts = [np.array(part) for part in (packed, *(r.astype(mx.float32) for r in rest))]
            self._packed[name] = AffineTensor(
                *map(from_numpy, parts), bits=bits, group_size=group_size
            )

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        return self._base.info(name)

    def read(self, name: str) -> HostTensor:
        packed = self._packed.get(name)
        if packed is None:
            return self._base.read(name)
        parts = [mx.array(t.raw()) for t in (packed.packed, packed.scales, packed.biases)]
        dense = mx.dequantize(*parts, group_size=packed.group_size, bits=packed.bits)
        return from_numpy(np.array(dense))

    def affine(self, name: str) -> AffineTensor | None:
        return self._packed.get(name)

    def relabel(self, name: str, **changes: object) -> None:
        """Make the stored format of ``name`` lie."""
        self._packed[name] = replace(self._packed[name], **changes)  # type: ignore[arg-type]


def assert_dense(actual: HostTensor, expected: HostTensor) -> None:
    """Equal to the bit on CPUs; GPUs fuse ``scale * q + bias`` into one rounding."""
    if mx.default_device().type == mx.DeviceType.cpu:
        assert np.array_equal(actual.float32(), expected.float32())
    else:
        np.testing.assert_allclose(actual.float32(), expected.float32(), rtol=1e-6, atol=1e-6)
