"""ModelSpec refuses what cannot be a model, and answers questions about its layers."""

from __future__ import annotations

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import DualChunkSpec, MoESpec, RoPESpec, SlidingWindowSpec
from tests.conftest import small_spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"vocab_size": -1}, "vocab_size must be positive"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
        ({"initializer_range": -1.0}, "initializer_range"),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_spec(**changes)


def moe(**changes: object) -> MoESpec:
    values: dict[str, object] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    return MoESpec(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{"num_experts_per_tok": 5}, {"decoder_sparse_step": 0}, {"num_experts": 0}]
)
def test_impossible_mixtures(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        moe(**changes)


def test_impossible_attention_settings() -> None:
    with pytest.raises(ConfigError, match="sliding_window must be positive"):
        SlidingWindowSpec(enabled=True, sliding_window=None)
    with pytest.raises(ConfigError, match="max_window_layers"):
        SlidingWindowSpec(max_window_layers=-1)
    with pytest.raises(ConfigError, match="local_size"):
        DualChunkSpec(chunk_size=8, local_size=8)
    with pytest.raises(ConfigError, match="rope_theta"):
        RoPESpec(rope_theta=1.0)


def test_window_applies_from_max_window_layers_on() -> None:
    window = SlidingWindowSpec(enabled=True, sliding_window=16, max_window_layers=2)
    spec = small_spec(window=window)
    assert [spec.window_of(layer) for layer in range(3)] == [None, None, 16]
    assert [small_spec().window_of(layer) for layer in range(3)] == [None] * 3


def test_specs_are_hashable_values() -> None:
    assert small_spec() == small_spec()
    assert len({small_spec(), small_spec(), small_spec(tied=False)}) == 2
    assert small_spec().model_type == "qwen2"
    assert small_spec(moe=moe()).model_type == "qwen2_moe"
    assert small_spec().num_key_value_groups == 2
