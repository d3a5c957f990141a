"""The MLX forward pass against the float64 reference."""

from __future__ import annotations

import gc

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402

from qwen2kit.backend.slots import Feed  # noqa: E402
from qwen2kit.spec.reference import ReferenceModel  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from qwen2kit_mlx.kernels import NativeKernels  # noqa: E402
from tests.conftest import random_weights  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, SPECS, model  # noqa: E402

TOKENS = np.random.default_rng(1).integers(0, 199, 23).tolist()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_float32_equals_the_reference(name: str, kernels: str) -> None:
    spec = SPECS[name]
    weights = random_weights(spec)
    reference, ours = ReferenceModel(spec, weights), model(spec, weights, kernels)
    states = reference.hidden_states(TOKENS)
    assert np.abs(ours.hidden_states(TOKENS) - states).max() < 2e-5 * np.abs(states).max()
    logits = reference.logits(TOKENS)
    assert ours.logits(TOKENS).dtype == np.float32
    assert np.abs(ours.logits(TOKENS) - logits).max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["tied", "yarn", "window"])
def test_half_precision_stays_near_the_reference(
    name: str, kernels: str, dtype: str, tolerance: float
) -> None:
    spec = SPECS[name]
    weights = random_weights(spec)
    expected = ReferenceModel(spec, weights).logits(TOKENS)
    got = model(spec, weights, kernels, dtype=getattr(mx, dtype)).logits(TOKENS)
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["tied", "multi-head", "yarn", "window"])
def test_a_compiled_model_equals_the_reference(name: str) -> None:
    """As on GPUs: what lies between products is compiled, here for the CPU."""
    spec = SPECS[name]
    weights = random_weights(spec)
    expected = ReferenceModel(spec, weights).logits(TOKENS)
    made = MLXModel(spec, mx.Device(mx.cpu), mx.float32, NativeKernels(fuse=True), 256)
    made.load(weights)
    tolerance = 1e-5 * np.abs(expected).max()
    assert np.abs(made.logits(TOKENS) - expected).max() < tolerance
    slots = made.slots(2, 64)
    slots.feed([Feed(0, 0, tuple(TOKENS[:20])), Feed(1, 0, tuple(TOKENS[:3]))])
    got = slots.feed([Feed(0, 20, tuple(TOKENS[20:22])), Feed(1, 3, (TOKENS[3],))]).rows([0, 1])
    slots.close()
    assert np.abs(got - expected[[21, 3]]).max() < tolerance


@pytest.mark.usefixtures("compiler")
def test_compiled_elementwise_chains_change_nothing() -> None:
    gate, up = mx.random.normal((3, 5)), mx.random.normal((3, 5))
    fused = NativeKernels(fuse=True).swiglu(gate, up)
    assert mx.allclose(fused, nn.silu(gate) * up, atol=1e-6)


def test_host_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is cut into query blocks; the cut must not show."""
    spec = SPECS["window"]
    weights = random_weights(spec)
    whole = model(spec, weights, "host").logits(TOKENS)
    monkeypatch.setattr("qwen2kit_mlx.host_kernels._SCORES_PER_BLOCK", 4 * 23 * 3)
    assert np.abs(model(spec, weights, "host").logits(TOKENS) - whole).max() < 1e-5


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fuse", [False, True])
def test_a_dropped_model_gives_its_memory_back_at_once(fuse: bool) -> None:
    """Without waiting for Python to look for cycles, also after it has computed."""
    spec = SPECS["untied"]
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        made = MLXModel(spec, mx.Device(mx.cpu), mx.float32, NativeKernels(fuse=fuse), 256)
        made.load(random_weights(spec))
        made.logits([1, 2, 3])
        assert mx.get_active_memory() - before > 100_000
        del made
        assert mx.get_active_memory() - before < 20_000
    finally:
        gc.enable()
