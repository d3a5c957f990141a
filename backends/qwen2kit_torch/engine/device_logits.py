"""Which kind of logits serves a device best."""

from __future__ import annotations

from torch import Tensor

from qwen2kit_torch.engine.logits import DeviceLogits
from qwen2kit_torch.engine.sorted_logits import SortedLogits
from qwen2kit_torch.triton_support import has_triton


def logits_on_device(logits_NV: Tensor) -> DeviceLogits:
    """``logits_NV``, to be drawn from where they are, unless that is the CPU."""
    kind = logits_NV.device.type
    if kind == "cpu":
        return DeviceLogits(logits_NV)
    if kind == "cuda" and has_triton():
        from qwen2kit_torch.engine.drawn_logits import DrawnLogits

        return DrawnLogits(logits_NV)
    return SortedLogits(logits_NV)
