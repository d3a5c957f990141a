"""Log-probabilities stay exact to float32 rounding over a vocabulary of real size."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit_mlx.device_logits import log_sum_exp  # noqa: E402


@pytest.mark.parametrize("vocab", [151_936, 5_001, 7])
def test_normaliser_equals_float64(vocab: int) -> None:
    logits = np.random.default_rng(0).normal(4.0, 2.5, (3, vocab)).astype(np.float32)
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1)
    expected = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=-1))
    np.testing.assert_allclose(log_sum_exp(mx.array(logits)), expected, rtol=0, atol=1e-5)
