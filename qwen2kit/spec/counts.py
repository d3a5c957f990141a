"""Parameter, memory and FLOP figures that follow from the schema alone."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamCounts:
    """Element counts.

    Attributes:
        total: every stored parameter.
        non_embedding: without embedding and (untied) head.
        activated: parameters one token passes through (top-k experts only); equals ``total``
            for a dense model.
        activated_non_embedding: ``activated`` without embedding and head.
    """

    total: int
    non_embedding: int
    activated: int
    activated_non_embedding: int


def count_params(spec: ModelSpec) -> ParamCounts:
    """Exact parameter counts of ``spec``."""
    total = embedding = idle = 0
    for param in schema(spec):
        total += param.size
        if param.kind in ("embedding", "head"):
            embedding += param.size
        if spec.moe and param.expert is not None and param.expert >= spec.moe.num_experts_per_tok:
            idle += param.size
    return ParamCounts(
        total=total,
        non_embedding=total - embedding,
        activated=total - idle,
        activated_non_embedding=total - idle - embedding,
    )


def kv_bytes_per_token(spec: ModelSpec, bytes_per_element: int = 2) -> int:
    """Bytes of keys and values one token adds to the cache, all layers together."""
    per_layer = 2 * spec.num_key_value_heads * spec.head_dim
    return spec.num_hidden_layers * per_layer * bytes_per_element


def train_flops_per_token(spec: ModelSpec, seq_len: int, *, frozen: bool = False) -> int:
    """FLOPs per token of one forward and backward pass (matrix products and causal attention).

    ``6 * matmul parameters (head included) + 6 * layers * heads * head_dim * seq_len``; the
    attention term already counts the causal half.

    Args:
        frozen: the weights do not train (adapters do, whose own products are not counted): 4
            instead of 6, because no weight gradients are computed.
    """
    counts = count_params(spec)
    matmul = counts.activated_non_embedding + spec.vocab_size * spec.hidden_size
    width = spec.num_attention_heads * spec.head_dim
    return (4 if frozen else 6) * matmul + 6 * spec.num_hidden_layers * width * seq_len
