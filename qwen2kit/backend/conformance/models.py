"""The small models the suite runs, and what the reference says about them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import Backend, CompiledModel
from qwen2kit.generate.sampling import Sampler, Sampling
from qwen2kit.spec.model import (
    LinearScaling,
    ModelSpec,
    RoPESpec,
    SlidingWindowSpec,
    YarnScaling,
)
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import MemorySource, WeightSource
from qwen2kit.weights.tensor import from_float32

TOLERANCE = 1e-3
PLAN = ExecutionPlan(dtype="float32")

TIED = ModelSpec(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    max_position_embeddings=96,
    rope=RoPESpec(rope_theta=10_000.0),
    window=SlidingWindowSpec(max_window_layers=3),
)
UNTIED = replace(TIED, tie_word_embeddings=False)
_YARN = YarnScaling(factor=4.0, original_max_position_embeddings=24)

DENSE: dict[str, ModelSpec] = {
    "tied": TIED,
    "untied": UNTIED,
    "multi-head": replace(UNTIED, num_key_value_heads=4),
    "one-kv-head": replace(UNTIED, num_key_value_heads=1),
    "wide-heads": replace(UNTIED, head_dim=32),
    "large-eps": replace(UNTIED, rms_norm_eps=1e-2),
    "yarn": replace(UNTIED, rope=RoPESpec(rope_theta=1e6, scaling=_YARN)),
    "linear-rope": replace(UNTIED, rope=RoPESpec(scaling=LinearScaling(factor=2.0))),
}
WINDOW = replace(
    UNTIED, window=SlidingWindowSpec(enabled=True, sliding_window=8, max_window_layers=1)
)


@lru_cache(maxsize=32)
def weights(spec: ModelSpec, seed: int = 0) -> MemorySource:
    """Random float32 weights, large enough that a wrong bias, norm or rotation shows.

    The buffers are read-only, like those of a memory-mapped checkpoint.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for param in schema(spec):
        values = 0.2 * rng.standard_normal(param.shape).astype(np.float32)
        tensor = from_float32(values + (param.kind == "norm"), "float32")
        tensors[param.name] = replace(tensor, data=tensor.data.toreadonly())
    return MemorySource(tensors)


def poisoned_weights(spec: ModelSpec, token: int) -> MemorySource:
    """`weights` with an embedding of NaN for one token: texts that hold it have no logits."""
    found = {}
    for param in schema(spec):
        tensor = weights(spec).read(param.name)
        if param.kind == "embedding":
            table = tensor.float32().copy()
            table[token] = np.nan
            tensor = from_float32(table, "float32")
        found[param.name] = tensor
    return MemorySource(found)


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids."""
    rng = np.random.default_rng(1000 + seed)
    return tuple(int(token) for token in rng.integers(0, UNTIED.vocab_size, length))


def loaded(
    backend: Backend,
    spec: ModelSpec,
    *,
    source: WeightSource | None = None,
    plan: ExecutionPlan = PLAN,
) -> CompiledModel:
    """``spec`` compiled and filled with `weights` (or ``source``)."""
    model = backend.compile(spec, plan)
    model.load(weights(spec) if source is None else source)
    return model


@lru_cache(maxsize=64)
def reference_logits(spec: ModelSpec, ids: tuple[int, ...]) -> NDArray[np.float64]:
    """Logits ``[T, vocab]`` of the reference on `weights`."""
    return ReferenceModel(spec, weights(spec)).logits(ids)


def reference_logprobs(spec: ModelSpec, ids: tuple[int, ...]) -> NDArray[np.float64]:
    """Log-softmax of `reference_logits`."""
    return log_softmax(reference_logits(spec, ids))


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row-wise natural-log softmax in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@lru_cache(maxsize=256)
def reference_continuation(
    spec: ModelSpec, prompt: tuple[int, ...], sampling: Sampling, stream: int = 0
) -> tuple[int, ...]:
    """Tokens the reference and the core sampler produce, one full forward per token."""
    reference, sampler = ReferenceModel(spec, weights(spec)), Sampler(sampling, prompt, stream)
    ids = list(prompt)
    for _ in range(sampling.max_new_tokens):
        ids.append(sampler.draw(reference.logits(ids)[-1].astype(np.float32))[0])
        if ids[-1] in sampling.stop_token_ids:
            break
    return tuple(ids[len(prompt) :])
