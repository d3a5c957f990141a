"""Workloads for the tests of `qwen2kit.plan`."""

from __future__ import annotations

from typing import Any

from qwen2kit.backend.plan import LoRAPlan, TrainPlan
from qwen2kit.config.tree import AdapterConfig
from qwen2kit.plan.communication import Cluster
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.hardware import find_hardware
from qwen2kit.plan.workload import Workload
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.presets import preset

LORA = LoRAPlan(rank=16, alpha=32.0, targets=AdapterConfig().targets)
NF4 = LoRAPlan(rank=16, alpha=32.0, targets=AdapterConfig().targets, quantize="nf4")


def workload(
    spec: ModelSpec | str = "qwen2-0.5b",
    parallel: Degrees | None = None,
    *,
    seq_len: int = 2048,
    batch_rows: int = 64,
    dtype: str = "bfloat16",
    **plan: Any,
) -> Workload:
    """A step of ``spec`` (or a preset) with the settings of `TrainPlan`."""
    return Workload(
        spec=preset(spec) if isinstance(spec, str) else spec,
        plan=TrainPlan(**{"micro_batch_rows": 1, **plan}, parallel=parallel or Degrees()),
        seq_len=seq_len,
        batch_rows=batch_rows,
        dtype=dtype,
    )


def cluster(gpus: int, gpu: str = "h100", gpus_per_node: int = 8) -> Cluster:
    """``gpus`` of one kind."""
    hardware = find_hardware(gpu)
    assert hardware is not None
    return Cluster(hardware=hardware, gpus=gpus, gpus_per_node=gpus_per_node)
