"""The MLX forward pass against the float64 reference."""

from __future__ import annotations

import gc

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402

from qwen2kit.spec.model import RoPESpec  # noqa: E402
from qwen2kit.spec.reference import ReferenceModel  # noqa: E402
from qwen2kit.spec.rope import rope_table  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from qwen2kit_mlx.kernels import NativeKernels  # noqa: E402
from qwen2kit_mlx.rotary import Rotary  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, SPECS, YARN, model  # noqa: E402

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


@pytest.mark.parametrize("start", [0, 2_000, 32_000, 120_000])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_rotation_is_exact_far_out(start: int, scaling: object) -> None:
    spec = small_spec(head_dim=64, rope=RoPESpec(rope_theta=1e6, scaling=scaling))  # type: ignore[arg-type]
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 64)).astype(np.float32)
    cos, sin = rope_table(spec).cos_sin(np.arange(start, start + 4))
    factor = rope_table(spec).attention_factor
    a, b = x[..., :32].astype(np.float64), x[..., 32:].astype(np.float64)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1) / factor
    rotary = Rotary(spec, mx.float32)
    assert np.abs(np.array(rotary.at(start, 4)(mx.array(x))) - expected).max() < 1e-6
    assert rotary.score_scale == pytest.approx(factor**2 / 8)


@pytest.mark.parametrize("most", [1 << 15, 1])
def test_every_way_to_rotate_is_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any positions, with values that stay, fused or by table, as one row after the other."""
    monkeypatch.setattr("qwen2kit_mlx.rotary.MOST_ROTATIONS", most)
    spec = small_spec(head_dim=16)
    x = mx.random.normal((2, 3, 5, 16)).astype(mx.float16)  # rows, tokens, heads (two are values)
    positions = np.array([[3, 4, 5], [90, 91, 92]])
    exact = Rotary(spec, mx.float32)
    rows = [exact.at(int(n[0]), 3)(r.astype(mx.float32).transpose(1, 0, 2)[None, :3])
            for n, r in zip(positions, x, strict=True)]  # fmt: skip
    expected = np.concatenate([np.array(row.transpose(0, 2, 1, 3)) for row in rows])
    for dtype, tolerance in ((mx.float32, 1e-6), (mx.float16, 4e-3)):
        rotary, values = Rotary(spec, dtype), x.astype(dtype)
        stacked = np.array(rotary.stacked(positions, 3, 2)(values).astype(mx.float32))
        assert np.abs(stacked[:, :, :3] - expected).max() < tolerance
        assert np.array_equal(stacked[:, :, 3:], np.array(values[:, :, 3:].astype(mx.float32)))
        flat = values.reshape(1, 6, 5, 16).transpose(0, 2, 1, 3)[:, :3]
        scattered = rotary.scattered(positions.reshape(-1))(flat).transpose(0, 2, 1, 3)
        got = np.array(scattered.astype(mx.float32)).reshape(2, 3, 3, 16)
        assert np.abs(got - expected).max() < tolerance


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
