"""Measured bandwidth and matrix rate of an MLX device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from qwen2kit.backend.meter import process_peak, seconds_of
from qwen2kit_mlx.kernels import Kernels


class MLXMeter:
    """Implements `qwen2kit.backend.meter.DeviceMeter`.

    Args:
        device: measured.
        dtype: compute dtype.
        name: its name.
        kernels: compute the models' products on this device.
    """

    def __init__(self, device: mx.Device, dtype: mx.Dtype, name: str, kernels: Kernels) -> None:
        self.dtype = name
        self._device, self._dtype, self._kernels = device, dtype, kernels
        self._on_cpu = device.type == mx.cpu

    def copy_bandwidth(self) -> float:
        """See `DeviceMeter.copy_bandwidth`; on a CPU NumPy copies, as its products do."""
        if self._on_cpu:
            source, target = np.ones((2, 1 << 27), dtype=np.uint8)
            return 2 * source.nbytes / seconds_of(lambda: np.copyto(target, source))
        with mx.stream(self._device):
            ones = mx.ones(1 << 28, dtype=mx.float32)
            return 2 * ones.nbytes / seconds_of(lambda: mx.eval(ones + 1))

    def matmul_rate(self) -> float:
        """See `DeviceMeter.matmul_rate`."""
        linear = self._kernels.linear
        size = 1024 if self._on_cpu else 8192
        with mx.stream(self._device):
            left = mx.random.normal((size, size)).astype(self._dtype)
            right = mx.random.normal((size, size)).astype(self._dtype)
            return 2 * size**3 / seconds_of(lambda: mx.eval(linear(left, right, None)))

    def reset_peak(self) -> None:
        """See `DeviceMeter.reset_peak`."""
        mx.reset_peak_memory()

    def peak_memory(self) -> int | None:
        """See `DeviceMeter.peak_memory`."""
        return process_peak() if self._on_cpu else mx.get_peak_memory()
