"""MLX arrays <-> host tensors, every dtype to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from qwen2kit.weights.tensor import HostTensor, from_bits, from_numpy


def to_host(array: mx.array) -> HostTensor:
    """Copy an MLX float or integer array to host memory, keeping its dtype."""
    if array.dtype == mx.bfloat16:
        return from_bits(np.array(array.view(mx.uint16)))
    return from_numpy(np.array(array))


def to_device(tensor: HostTensor) -> mx.array:
    """Copy a host tensor to the current device, keeping its dtype."""
    array = mx.array(tensor.raw())
    return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array
