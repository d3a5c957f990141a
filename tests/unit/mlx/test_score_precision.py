"""Log-probabilities stay exact to float32 rounding over a vocabulary of real size."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit_mlx.host_kernels import HostKernels  # noqa: E402
from qwen2kit_mlx.kernels import Kernels, NativeKernels  # noqa: E402

KERNELS = {"native": NativeKernels(fuse=False), "host": HostKernels()}


@pytest.fixture(params=KERNELS.values(), ids=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found: Kernels = request.param
    return found


@pytest.mark.parametrize("vocab", [151_936, 5_001, 7])
def test_normaliser_equals_float64(kernels: Kernels, vocab: int) -> None:
    logits = np.random.default_rng(0).normal(4.0, 2.5, (3, vocab)).astype(np.float32)
    logits[1, : vocab // 2] = -np.inf
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1)
    expected = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=-1))
    found = np.asarray(kernels.log_sum_exp(mx.array(logits)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_normaliser_of_broken_rows_is_not_finite(kernels: Kernels) -> None:
    rows = np.zeros((4, 600), dtype=np.float32)
    rows[0, 5], rows[1, 5], rows[2] = np.nan, np.inf, -np.inf
    found = np.asarray(kernels.log_sum_exp(mx.array(rows)))
    assert not np.isfinite(found[:3]).any()
    assert found[3] == pytest.approx(np.log(600))


@pytest.mark.filterwarnings("error")
def test_activation_equals_float64(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    gate, up = rng.normal(0, 30, (2, 64, 96)).astype(np.float32)
    gate[0, :3] = -1e4, 1e4, 0
    wide = gate.astype(np.float64)
    expected = wide * up / (1 + np.exp(-np.maximum(wide, -700)))
    found = np.asarray(kernels.swiglu(mx.array(gate), mx.array(up)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)
