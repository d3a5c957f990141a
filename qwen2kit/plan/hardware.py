"""Accelerators as rows of data: what they compute, hold and exchange per second.

Sources: NVIDIA's data sheets and architecture white papers of each product. Peaks are dense (no
structured sparsity) and, for GeForce cards, with float32 accumulation. ``memory`` is what
``torch.cuda`` reports as total capacity, which is a few per cent less than the box says.
``link`` is one direction of one GPU's path to its neighbours in the node (half of the NVLink
figure that data sheets print, or PCIe); ``network`` is what is usual per GPU between nodes:
400 Gb/s for Hopper and Blackwell servers, 200 Gb/s for A100, a shared card for PCIe machines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator.

    Attributes:
        name: short name, e.g. for the command line.
        pattern: regular expression for the name that ``torch.cuda`` reports, in lower case.
        bf16_tflops: dense bfloat16 TFLOP/s of the tensor cores.
        fp32_tflops: float32 TFLOP/s outside the tensor cores.
        float8: whether the tensor cores take float8.
        memory_gib: memory in GiB.
        memory_gbs: bandwidth of the memory in GB/s.
        link_gbs: GB/s to the other GPUs of the node, one direction.
        network_gbs: GB/s to other nodes, one direction.
    """

    name: str
    pattern: str
    bf16_tflops: float
    fp32_tflops: float
    float8: bool
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float

    @property
    def memory_bytes(self) -> int:
        """Total memory in bytes."""
        return int(self.memory_gib * _GIB)

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second between memory and cores."""
        return self.memory_gbs * _GIGA

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second to the GPUs of the node, one direction."""
        return self.link_gbs * _GIGA

    @property
    def network_bandwidth(self) -> float:
        """Bytes per second to other nodes, one direction."""
        return self.network_gbs * _GIGA

    def peak(self, dtype: str) -> float:
        """FLOP/s of dense matrix products in ``dtype`` (``bfloat16``, ``float16``,
        ``float32``)."""
        return (self.fp32_tflops if dtype == "float32" else self.bf16_tflops) * _TERA


# A more specific name stands before the name it contains.
HARDWARE: Final = (
    Hardware("gb200", r"\bgb200\b", 2500, 80, True, 184.0, 8000, 900, 50),
    Hardware("b300", r"\bb300\b", 2250, 75, True, 267.0, 8000, 900, 100),
    Hardware("b200", r"\bb200\b", 2250, 75, True, 178.3, 7700, 900, 50),
    Hardware("gh200", r"\bgh200\b", 989, 67, True, 94.5, 4000, 450, 50),
    Hardware("h200-nvl", r"\bh200 nvl\b", 835, 60, True, 139.7, 4800, 450, 50),
    Hardware("h200", r"\bh200\b", 989, 67, True, 139.7, 4800, 450, 50),
    Hardware("h100-pcie", r"\bh100 pcie\b", 756, 51, True, 79.1, 2000, 64, 25),
    Hardware("h100-nvl", r"\bh100 nvl\b", 835, 60, True, 93.0, 3900, 300, 25),
    Hardware("h100", r"\bh100\b", 989, 67, True, 79.1, 3350, 450, 50),
    Hardware("h800", r"\bh800\b", 989, 67, True, 79.1, 3350, 200, 50),
    Hardware("h20", r"\bh20\b", 148, 44, True, 95.0, 4000, 450, 50),
    Hardware("a100-80g-pcie", r"\ba100 80gb pcie\b", 312, 19.5, False, 79.1, 1935, 32, 12.5),
    Hardware("a100-40g-pcie", r"\ba100-pcie", 312, 19.5, False, 39.4, 1555, 32, 12.5),
    Hardware("a100-40g", r"\ba100-sxm4-40gb\b", 312, 19.5, False, 39.4, 1555, 300, 25),
    Hardware("a100-80g", r"\ba100\b", 312, 19.5, False, 79.1, 2039, 300, 25),
    Hardware("a800", r"\ba800\b", 312, 19.5, False, 79.1, 2039, 200, 25),
    Hardware("l40s", r"\bl40s\b", 362, 91.6, True, 44.4, 864, 32, 12.5),
    Hardware("l40", r"\bl40\b", 181, 90.5, True, 44.4, 864, 32, 12.5),
    Hardware("l4", r"\bl4\b", 121, 30.3, True, 22.0, 300, 32, 6),
    Hardware("a40", r"\ba40\b", 150, 37.4, False, 44.4, 696, 32, 12.5),
    Hardware("a10g", r"\ba10g\b", 70, 35, False, 22.0, 600, 32, 6),
    Hardware("a10", r"\ba10\b", 125, 31.2, False, 22.0, 600, 32, 6),
    Hardware("rtx-pro-6000", r"\brtx pro 6000\b", 504, 125, True, 94.9, 1792, 64, 6),
    Hardware("rtx-6000-ada", r"\brtx 6000 ada\b", 364, 91.1, True, 47.4, 960, 32, 6),
    Hardware("rtx-a6000", r"\brtx a6000\b", 155, 38.7, False, 47.4, 768, 32, 6),
    Hardware("rtx-5090", r"\brtx 5090$", 209, 104.8, True, 31.4, 1792, 64, 3),
    Hardware("rtx-4090", r"\brtx 4090$", 165, 82.6, True, 23.6, 1008, 32, 3),
    Hardware("rtx-3090", r"\brtx 3090$", 71, 35.6, False, 23.6, 936, 32, 3),
)
NAMES: Final = tuple(row.name for row in HARDWARE)


def find_hardware(kind: str) -> Hardware | None:
    """The row of a device.

    Args:
        kind: a short name (`NAMES`) or what ``torch.cuda`` reports, e.g. ``NVIDIA H200``.

    Returns:
        None for unknown devices, CPUs and slices of a GPU (MIG).
    """
    text = kind.lower().strip()
    for row in HARDWARE:
        if row.name == text:
            return row
    if " mig " in text:
        return None
    return next((row for row in HARDWARE if re.search(row.pattern, text)), None)


def peak_flops(kind: str, dtype: str = "bfloat16") -> float | None:
    """Dense matrix FLOP/s of a device (see `find_hardware`), or None if it is unknown."""
    row = find_hardware(kind)
    return None if row is None else row.peak(dtype)
