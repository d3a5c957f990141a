"""MLXBackend: what the entry point ``qwen2kit.backends: mlx`` loads."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

import mlx.core as mx

from qwen2kit.backend.limits import check_cache_bits, check_weight_bits, context_limit
from qwen2kit.backend.meter import DeviceMeter
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import PROTOCOL_VERSION, Capabilities, Device
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.compiled import MLXModel
from qwen2kit_mlx.cuda_kernels import CUDAKernels
from qwen2kit_mlx.host_kernels import HostKernels
from qwen2kit_mlx.kernels import Kernels, NativeKernels
from qwen2kit_mlx.packed_columns import CACHE_BITS, GROUP_SIZES, group_size
from qwen2kit_mlx.weights import BITS, DTYPES


class MLXBackend:
    """Inference by MLX on Apple GPUs, CUDA GPUs and CPUs."""

    name = "mlx"
    protocol_version = PROTOCOL_VERSION

    def capabilities(self) -> Capabilities:
        """See `Backend.capabilities`."""
        return Capabilities(
            dtypes=tuple(DTYPES), quantized_bits=BITS, cache_bits=CACHE_BITS, sliding_window=True
        )

    def devices(self) -> tuple[Device, ...]:
        """Usable devices, MLX's default first."""
        default = mx.default_device().type
        kinds = sorted(
            (kind for kind in (mx.gpu, mx.cpu) if mx.is_available(mx.Device(kind))),
            key=lambda kind: kind != default,
        )
        return tuple(_describe(kind) for kind in kinds)

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return {"mlx": version("mlx")}

    def compile(self, spec: ModelSpec, plan: ExecutionPlan) -> MLXModel:
        """Build the model without weights.

        Raises:
            BackendError: the plan trains, the device does not exist, the spec is a mixture of
                experts, ``max_seq_len`` is more than the model can take here, or its heads are too
                narrow for ``cache_bits``.
        """
        if plan.train is not None:
            raise BackendError(
                "the mlx backend runs inference only; training runs on torch (--backend torch)"
            )
        if spec.moe is not None:
            raise BackendError(
                f"the mlx backend does not run mixture-of-experts models ({spec.model_type})"
            )
        check_cache_bits(plan, CACHE_BITS)
        check_weight_bits(plan, ())
        if plan.cache_bits is not None and group_size(spec.head_dim) is None:
            raise BackendError(
                f"cache_bits needs heads whose size is a multiple of {GROUP_SIZES[-1]}; this "
                f"model's is {spec.head_dim}"
            )
        # MLX's CUDA build rounds float32 products to TF32 unless told otherwise; float32 here means
        # float32, or no comparison between backends would.
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
        device, name = self._placement(plan)
        kernels = _kernels(device.type == mx.cpu)
        return MLXModel(spec, device, DTYPES[name], kernels, context_limit(spec, plan))

    def meter(self, plan: ExecutionPlan) -> DeviceMeter:
        """Measures the device that ``plan`` names; see `MeteredBackend`."""
        from qwen2kit_mlx.meter import MLXMeter

        device, name = self._placement(plan)
        return MLXMeter(device, DTYPES[name], name, _kernels(device.type == mx.cpu))

    def _placement(self, plan: ExecutionPlan) -> tuple[mx.Device, str]:
        """Device and compute dtype of a plan."""
        device = self._device(plan.device)
        default = "float32" if device.type == mx.cpu else "bfloat16"
        return device, default if plan.dtype == "auto" else plan.dtype

    def _device(self, name: str) -> mx.Device:
        usable = [device.name for device in self.devices()]
        if name == "auto":
            name = usable[0]
        if name not in usable:
            raise BackendError(
                f"the mlx backend has no device {name!r} on this machine; "
                f"it has: {', '.join(usable)}"
            )
        return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def _describe(kind: mx.DeviceType) -> Device:
    info = mx.device_info(mx.Device(kind))
    memory = info.get("memory_size", info.get("total_memory"))
    name = "gpu" if kind == mx.gpu else "cpu"
    return Device(
        name=name,
        kind=str(info.get("device_name", name)),
        memory_bytes=memory if isinstance(memory, int) else None,
    )


def _kernels(on_cpu: bool) -> Kernels:
    if on_cpu and sys.platform != "darwin":
        return HostKernels()
    if not on_cpu and mx.cuda.is_available():
        return CUDAKernels(fuse=True, architecture=_architecture())
    return NativeKernels(fuse=not on_cpu)


def _architecture() -> str | None:
    """The GPU's, such as ``sm_90``; None where it lacks what `cuda_source` uses."""
    info = mx.device_info(mx.Device(mx.gpu))
    name, major = info.get("architecture"), info.get("compute_capability_major", 0)
    return name if isinstance(name, str) and isinstance(major, int) and major >= 8 else None
