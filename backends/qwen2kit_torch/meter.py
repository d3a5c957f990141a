"""Measured bandwidth and matrix rate of a torch device."""

from __future__ import annotations

import torch

from qwen2kit.backend.meter import process_peak, seconds_of
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit_torch.devices import resolve_device, resolve_dtype


class TorchMeter:
    """Implements `qwen2kit.backend.meter.DeviceMeter`."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self._device = resolve_device(plan)
        self._dtype = resolve_dtype(plan, self._device)
        self._on_cpu = self._device.type == "cpu"
        self.dtype = str(self._dtype).removeprefix("torch.")

    @torch.inference_mode()
    def copy_bandwidth(self) -> float:
        """See `DeviceMeter.copy_bandwidth`."""
        size = 1 << (27 if self._on_cpu else 30)
        source = torch.ones(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * size / seconds_of(lambda: target.copy_(source), self._wait)

    @torch.inference_mode()
    def matmul_rate(self) -> float:
        """See `DeviceMeter.matmul_rate`."""
        size = 1024 if self._on_cpu else 8192
        left, right = torch.randn(2, size, size, device=self._device, dtype=self._dtype)
        return 2 * size**3 / seconds_of(lambda: left @ right, self._wait)

    def reset_peak(self) -> None:
        """See `DeviceMeter.reset_peak`."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_memory(self) -> int | None:
        """See `DeviceMeter.peak_memory`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return process_peak() if self._on_cpu else None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
