"""Rotary tables against transformers' own functions and the values worked out for Qwen2."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import LinearScaling, ModelSpec, RoPESpec, YarnScaling
from qwen2kit.spec.presets import preset
from qwen2kit.spec.rope import rope_table

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=32768)


def with_rope(name: str, **rope: object) -> ModelSpec:
    return replace(preset(name), rope=RoPESpec(**rope))  # type: ignore[arg-type]


def transformers_table(spec: ModelSpec) -> tuple[np.ndarray, float]:
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.Qwen2Config(**to_hf_config(spec, dtype="float32"))
    function = utils.ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    inv_freq, factor = function(config, device="cpu")
    return inv_freq.double().numpy(), factor


@pytest.mark.parametrize("name", ["tiny", "qwen2-0.5b", "qwen2-7b", "qwen2-72b"])
@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        replace(YARN, factor=2.0),
        replace(YARN, factor=8.0, truncate=False),
        replace(YARN, beta_fast=16.0, beta_slow=2.0),
        replace(YARN, attention_factor=1.5),
        replace(YARN, mscale=0.7, mscale_all_dim=0.9),
        replace(YARN, mscale=0.7),
        replace(YARN, factor=1.0),
        YarnScaling(factor=4.0, original_max_position_embeddings=128),
        LinearScaling(factor=3.0),
    ],
)
def test_scaled_tables_equal_transformers(name: str, scaling: YarnScaling | LinearScaling) -> None:
    spec = with_rope(name, rope_theta=preset(name).rope.rope_theta, scaling=scaling)
    inv_freq, factor = transformers_table(spec)
    ours = rope_table(spec)
    np.testing.assert_allclose(ours.inv_freq, inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("theta", [1e4, 1e6, 1e7])
def test_plain_table_is_the_formula(theta: float) -> None:
    spec = with_rope("qwen2-7b", rope_theta=theta)
    expected = 1.0 / theta ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(rope_table(spec).inv_freq, expected, rtol=1e-14)
    assert rope_table(spec).attention_factor == 1.0


@pytest.mark.parametrize(("name", "low", "high"), [("qwen2-7b", 23, 40), ("qwen2-0.5b", 11, 20)])
def test_yarn_ramp_bounds_of_qwen2(name: str, low: int, high: int) -> None:
    plain = np.asarray(rope_table(preset(name)).inv_freq)
    table = rope_table(with_rope(name, rope_theta=1e6, scaling=YARN))
    ratio = np.asarray(table.inv_freq) / plain
    assert table.attention_factor == pytest.approx(1.138629, abs=1e-6)
    np.testing.assert_allclose(ratio[: low + 1], 1.0)
    np.testing.assert_allclose(ratio[high:], 0.25)
    assert (np.diff(ratio[low : high + 1]) < 0).all()


def test_cos_sin_equal_transformers_rotary_module() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    spec = with_rope("qwen2-0.5b", rope_theta=1e6, scaling=YARN)
    config = transformers.Qwen2Config(**to_hf_config(spec, dtype="float32"))
    positions = np.arange(64)
    rotary = modeling.Qwen2RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
    ours = rope_table(spec).cos_sin(positions)
    half = spec.head_dim // 2
    np.testing.assert_allclose(ours[0], cos[0, :, :half].numpy(), atol=1e-5)
    np.testing.assert_allclose(ours[1], sin[0, :, :half].numpy(), atol=1e-5)


def test_cosines_less_one_keep_their_digits() -> None:
    table = rope_table(with_rope("qwen2-0.5b", rope_theta=1e6, scaling=YARN))
    positions = np.array([0, 1, 7, 1000, 30_000])
    angles = np.outer(positions, np.asarray(table.inv_freq, dtype=np.longdouble))
    # 1 - cos = sin^2 / (1 + cos) where the cosine is positive.
    exact = np.where(
        np.cos(angles) > 0, -(np.sin(angles) ** 2) / (1 + np.cos(angles)), np.cos(angles) - 1
    )
    found = table.cos_less_one(positions)
    assert 0 < np.abs(found[1]).min() < 1e-12
    np.testing.assert_allclose(found, exact * table.attention_factor, rtol=1e-10, atol=0)
    np.testing.assert_allclose(
        found, table.cos_sin(positions)[0] - table.attention_factor, rtol=0, atol=1e-15
    )
