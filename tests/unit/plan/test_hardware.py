"""Accelerators by the names that ``torch.cuda`` gives them, and published peaks."""

from __future__ import annotations

import pytest

from qwen2kit.plan.hardware import HARDWARE, NAMES, find_hardware, peak_flops

REPORTED = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H800": "h800",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA H20": "h20",
    "NVIDIA B200": "b200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB200": "gb200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100 80GB PCIe": "a100-80g-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-40g-pcie",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA A40": "a40",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}


@pytest.mark.parametrize("kind", REPORTED)
def test_reported_names(kind: str) -> None:
    row = find_hardware(kind)
    assert row is not None
    assert row.name == REPORTED[kind]


def test_every_row_can_be_found() -> None:
    assert set(REPORTED.values()) == set(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    assert all(find_hardware(name) is row for name, row in zip(NAMES, HARDWARE, strict=True))


@pytest.mark.parametrize(
    "kind",
    [
        "x86_64",
        "Apple GPU",
        "Tesla V100-SXM2-32GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "",
    ],
)
def test_unknown_devices(kind: str) -> None:
    assert find_hardware(kind) is None
    assert peak_flops(kind) is None


def test_peaks_are_dense() -> None:
    # The data sheets print 1,979 (H100) and 624 (A100) TFLOP/s, with sparsity.
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == 67e12


def test_rows_are_plausible() -> None:
    for row in HARDWARE:
        assert row.bf16_tflops > row.fp32_tflops > 10
        assert 16 <= row.memory_gib < 300
        assert row.link_bandwidth >= row.network_bandwidth > 1e9
        # FLOPs per byte between memory and tensor cores, 37 (H20) to 500 (L4).
        assert 30 < row.peak("bfloat16") / row.memory_bandwidth < 500
