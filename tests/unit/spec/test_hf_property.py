"""For every spec that can exist: from_hf_config(to_hf_config(spec)) == spec."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.spec.hf import from_hf_config, to_hf_config
from qwen2kit.spec.model import (
    DualChunkSpec,
    LinearScaling,
    ModelSpec,
    MoESpec,
    RoPESpec,
    SlidingWindowSpec,
    YarnScaling,
)

sizes = st.integers(1, 64)
factors = st.floats(1e-3, 1e3, allow_nan=False)
optional_factor = st.none() | factors
token = st.none() | st.integers(0, 200_000)

yarn = st.builds(
    YarnScaling,
    factor=factors,
    original_max_position_embeddings=st.integers(1, 1 << 20),
    beta_fast=factors,
    beta_slow=factors,
    attention_factor=optional_factor,
    mscale=optional_factor,
    mscale_all_dim=optional_factor,
    truncate=st.booleans(),
)
rope = st.builds(
    RoPESpec,
    rope_theta=st.floats(1.5, 1e8),
    scaling=st.none() | yarn | st.builds(LinearScaling, factor=factors),
)
window = st.builds(
    SlidingWindowSpec,
    enabled=st.booleans(),
    sliding_window=st.integers(1, 1 << 20),
    max_window_layers=st.integers(0, 64),
)
moe = st.integers(1, 16).flatmap(
    lambda experts: st.builds(
        MoESpec,
        num_experts=st.just(experts),
        num_experts_per_tok=st.integers(1, experts),
        moe_intermediate_size=sizes,
        shared_expert_intermediate_size=sizes,
        norm_topk_prob=st.booleans(),
        decoder_sparse_step=st.integers(1, 4),
        mlp_only_layers=st.lists(st.integers(0, 63), max_size=3).map(tuple),
        router_aux_loss_coef=st.floats(0, 1),
        output_router_logits=st.booleans(),
    )
)
dual_chunk = st.integers(2, 1 << 18).flatmap(
    lambda chunk: st.builds(
        DualChunkSpec,
        chunk_size=st.just(chunk),
        local_size=st.integers(1, chunk - 1),
        original_max_position_embeddings=st.none() | st.integers(1, 1 << 20),
    )
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    groups, kv_heads = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim = 2 * draw(st.integers(1, 64))
    hidden = draw(st.just(groups * kv_heads * head_dim) | st.integers(1, 4096))
    return ModelSpec(
        vocab_size=draw(st.integers(1, 200_000)),
        hidden_size=hidden,
        intermediate_size=draw(sizes),
        num_hidden_layers=draw(sizes),
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=draw(st.integers(1, 1 << 21)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-2)),
        initializer_range=draw(st.floats(0, 1)),
        rope=draw(rope),
        window=draw(window),
        dual_chunk=draw(st.none() | dual_chunk),
        moe=draw(st.none() | moe),
        bos_token_id=draw(token),
        eos_token_id=draw(token | st.lists(st.integers(0, 200_000), min_size=1).map(tuple)),
        pad_token_id=draw(token),
    )


@settings(max_examples=150, deadline=None)
@given(specs())
def test_round_trip(spec: ModelSpec) -> None:
    written = json.loads(json.dumps(to_hf_config(spec, dtype="bfloat16")))
    assert from_hf_config(written) == spec
