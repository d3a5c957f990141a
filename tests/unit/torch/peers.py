"""The same random model in our torch backend and in transformers, for side-by-side tests."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import (
    LinearScaling,
    ModelSpec,
    RoPESpec,
    SlidingWindowSpec,
    YarnScaling,
)
from qwen2kit.weights.source import WeightSource
from tests.conftest import random_weights, small_spec

torch = pytest.importorskip("torch")

SPECS = {
    "tied": small_spec(),
    "untied": small_spec(tied=False),
    "multi-head": small_spec(num_key_value_heads=4),
    "wide heads": small_spec(head_dim=32),
    "yarn": small_spec(
        rope=RoPESpec(scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64))
    ),
    "linear": small_spec(rope=RoPESpec(scaling=LinearScaling(factor=2.0))),
    "window": small_spec(
        window=SlidingWindowSpec(enabled=True, sliding_window=6, max_window_layers=1)
    ),
}
TOKENS = [5, 17, 3, 3, 198, 0, 42, 77, 120, 9, 11, 64, 150, 31, 2, 88, 88, 101, 7, 13]


def ours(spec: ModelSpec, weights: WeightSource | None = None, **plan: Any) -> Any:
    """A loaded TorchModel on the CPU."""
    from qwen2kit_torch.backend import TorchBackend

    model = TorchBackend().compile(spec, ExecutionPlan(**({"device": "cpu"} | plan)))
    model.load(weights or random_weights(spec))
    return model


def theirs(spec: ModelSpec, dtype: str = "float32") -> Any:
    """transformers' Qwen2ForCausalLM with the weights of `random_weights`."""
    transformers = pytest.importorskip("transformers")
    weights = random_weights(spec)
    config = transformers.Qwen2Config(**to_hf_config(spec, dtype=dtype))
    config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(config).eval()
    state = {name: torch.tensor(weights.read(name).float32()) for name in weights.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.to(getattr(torch, dtype))


def continued(peer: Any, prompt: list[int], new: int, **options: Any) -> list[int]:
    """What transformers' greedy ``generate`` appends to ``prompt``."""
    tokens = torch.tensor([prompt])
    out = peer.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        **options,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found
