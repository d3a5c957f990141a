"""Devices of this machine, and what an execution plan's ``device`` and ``dtype`` mean on them."""

from __future__ import annotations

import os
import platform

import torch

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import Device
from qwen2kit.errors import BackendError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def devices() -> tuple[Device, ...]:
    """CUDA devices, then MPS, then the CPU."""
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                Device(
                    name=f"cuda:{index}",
                    kind=properties.name,
                    memory_bytes=properties.total_memory,
                )
            )
    if torch.backends.mps.is_available():
        found.append(Device(name="mps", kind="Apple GPU", memory_bytes=_host_memory()))
    cpu = platform.processor() or platform.machine()
    return (*found, Device(name="cpu", kind=cpu, memory_bytes=_host_memory()))


def resolve_device(plan: ExecutionPlan) -> torch.device:
    """The device a plan names; ``auto`` is the best one, ``cuda`` this process's CUDA device.

    Raises:
        BackendError: there is no such device here.
    """
    names = [device.name for device in devices()]
    own = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cuda:0"
    best = own if own in names else names[0]
    wanted = {"auto": best, "cuda": own}.get(plan.device, plan.device)
    if wanted not in names:
        raise BackendError(
            f"torch has no device {plan.device!r} on this machine; available: {', '.join(names)}"
        )
    return torch.device(wanted)


def resolve_dtype(plan: ExecutionPlan, device: torch.device) -> torch.dtype:
    """The compute dtype of a plan; ``auto`` is float32 on the CPU and bfloat16 elsewhere."""
    if plan.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[plan.dtype]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, as far as is known.

    On a CPU it is what the system can give without swapping; where it does not say, half of all.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return (_host_memory() or 1 << 34) // 2


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
