"""The NumPy reference against transformers in float64: the arbiter itself has to be right."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import BackendError
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import (
    DualChunkSpec,
    LinearScaling,
    ModelSpec,
    MoESpec,
    RoPESpec,
    SlidingWindowSpec,
    YarnScaling,
)
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.source import MemorySource
from tests.conftest import random_weights, small_spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MOE = MoESpec(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
)
TOKENS = [5, 17, 3, 3, 198, 0, 42, 77, 120, 9, 11, 64, 150, 31, 2, 88, 88, 101, 7, 13]
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64)

DENSE = {
    "tied": small_spec(),
    "untied": small_spec(tied=False),
    "multi-head": small_spec(num_key_value_heads=4),
    "one kv head": small_spec(num_key_value_heads=1),
    "wide heads": small_spec(head_dim=32),
    "eps 1e-3": small_spec(rms_norm_eps=1e-3),
    "yarn": small_spec(rope=RoPESpec(scaling=YARN)),
    "linear": small_spec(rope=RoPESpec(scaling=LinearScaling(factor=2.0))),
    "window": small_spec(
        window=SlidingWindowSpec(enabled=True, sliding_window=6, max_window_layers=1)
    ),
}
SPARSE = {
    "moe": small_spec(tied=False, moe=MOE),
    "tied moe": small_spec(moe=MOE),
    "norm_topk_prob": small_spec(moe=replace(MOE, norm_topk_prob=True)),
    "mlp_only_layers": small_spec(moe=replace(MOE, mlp_only_layers=(1,))),
    "sparse step 2": small_spec(num_hidden_layers=4, moe=replace(MOE, decoder_sparse_step=2)),
}


class Float64Torch:
    """The torch module, but asking for float32 gives float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@pytest.fixture(autouse=True)
def _float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, softmax, router and rotary tables in float32 even in a double
    model; here they follow, so that the comparison can be tight."""
    for name in ("models.qwen2.modeling_qwen2", "models.qwen2_moe.modeling_qwen2_moe",
                 "modeling_rope_utils"):  # fmt: skip
        monkeypatch.setattr(import_module(f"transformers.{name}"), "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def double_model(spec: ModelSpec, weights: MemorySource) -> Any:
    config = to_hf_config(spec, dtype="float32")
    config.pop("model_type")
    if spec.moe is None:
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**config, attn_implementation="eager")
        )
    else:
        model = transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(
                **config, attn_implementation="eager", experts_implementation="eager"
            )
        )
    model = model.double().eval()
    state = {name: torch.from_numpy(weights.read(name).float32().copy()).double()
             for name in weights.names()}  # fmt: skip
    missing = model.load_state_dict(stacked(state, spec), strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def stacked(state: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """transformers 5 holds all experts of a layer in two tensors."""
    for layer in range(spec.num_hidden_layers):
        if not spec.is_sparse(layer) or spec.moe is None:
            continue
        stem = f"model.layers.{layer}.mlp.experts."
        experts = [
            [state.pop(f"{stem}{e}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for e in range(spec.moe.num_experts)
        ]
        state[stem + "gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in experts])
        state[stem + "down_proj"] = torch.stack([e[2] for e in experts])
    return state


def compare(spec: ModelSpec, tolerance: float) -> None:
    weights = random_weights(spec, seed=3)
    reference = ReferenceModel(spec, weights)
    with torch.no_grad():
        output = double_model(spec, weights)(
            torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False
        )
    ours, theirs = reference.logits(TOKENS), output.logits[0].numpy()
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() <= tolerance
    states = reference.hidden_states(TOKENS)
    assert states.shape == (spec.num_hidden_layers + 2, len(TOKENS), spec.hidden_size)
    # transformers replaces the last layer's output by the final norm's in this list.
    for index in range(spec.num_hidden_layers):
        assert np.abs(states[index] - output.hidden_states[index][0].numpy()).max() <= tolerance
    assert np.abs(states[-1] - output.hidden_states[-1][0].numpy()).max() <= tolerance


@pytest.mark.parametrize("spec", DENSE.values(), ids=DENSE)
def test_dense_equals_transformers_in_float64(spec: ModelSpec) -> None:
    compare(spec, 1e-9)


@pytest.mark.parametrize("spec", SPARSE.values(), ids=SPARSE)
def test_mixture_equals_transformers_in_float64(spec: ModelSpec) -> None:
    compare(spec, 1e-9)


def test_window_changes_the_result() -> None:
    window, full = (
        ReferenceModel(spec, random_weights(DENSE["window"], seed=3)).logits(TOKENS)
        for spec in (DENSE["window"], small_spec())
    )
    np.testing.assert_array_equal(window[:6], full[:6])
    assert np.abs(window[7:] - full[7:]).max() > 1e-3


def test_dual_chunk_attention_is_refused() -> None:
    spec = small_spec(dual_chunk=DualChunkSpec(chunk_size=16, local_size=4))
    with pytest.raises(BackendError, match="dual chunk"):
        ReferenceModel(spec, random_weights(spec))
