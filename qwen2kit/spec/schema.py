"""ModelSpec -> the list of its parameters: canonical name, logical axes, initialiser.

Canonical names are the Hugging Face on-disk names (MoE experts one by one, as checkpoints store
them). Modules, weight loading, conversion, sharding, quantisation, memory and parameter counts
are folds over this list; no other file may spell a parameter name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from qwen2kit.spec.axes import Axis, Dim
from qwen2kit.spec.model import ModelSpec, MoESpec

EMBED_TOKENS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

Init = Literal["normal", "zeros", "ones"]
Kind = Literal["embedding", "linear", "bias", "norm", "router", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter tensor.

    Attributes:
        name: canonical (Hugging Face on-disk) name.
        dims: logical axes per dimension, in storage order ``[out, in]`` for matrices.
        shape: sizes of ``dims``.
        kind: role; decides weight decay and eligibility for quantisation.
        init: initial distribution; ``normal`` is N(0, initializer_range).
        layer: decoder layer index, or None outside the stack.
        expert: expert index inside a sparse layer, or None.
    """

    name: str
    dims: tuple[Dim, ...]
    shape: tuple[int, ...]
    kind: Kind
    init: Init
    layer: int | None = None
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether AdamW's weight decay applies: matrices yes, biases and norms no."""
        return len(self.shape) > 1

    @property
    def quantizable(self) -> bool:
        """Whether weight-only quantisation applies (embeddings and matrices, not the router)."""
        return self.kind in ("linear", "embedding", "head")


def axis_size(spec: ModelSpec, axis: Axis) -> int:
    """Length of a logical axis under ``spec``.

    Raises:
        KeyError: an expert axis is asked of a dense spec.
    """
    sizes = {
        Axis.VOCAB: spec.vocab_size,
        Axis.EMBED: spec.hidden_size,
        Axis.HEADS: spec.num_attention_heads,
        Axis.KV_HEADS: spec.num_key_value_heads,
        Axis.HEAD: spec.head_dim,
        Axis.FFN: spec.intermediate_size,
        Axis.ONE: 1,
    }
    if spec.moe is not None:
        sizes[Axis.EXPERT] = spec.moe.num_experts
        sizes[Axis.EXPERT_FFN] = spec.moe.moe_intermediate_size
        sizes[Axis.SHARED_FFN] = spec.moe.shared_expert_intermediate_size
    return sizes[axis]


@lru_cache(maxsize=32)
def schema(spec: ModelSpec) -> tuple[Param, ...]:
    """All parameters of ``spec`` in file order.

    A tied head contributes no parameter: ``lm_head.weight`` exists only if it is stored.
    """
    return tuple(_Builder(spec).build())


@lru_cache(maxsize=32)
def schema_by_name(spec: ModelSpec) -> dict[str, Param]:
    """`schema` keyed by canonical name."""
    return {param.name: param for param in schema(spec)}


class _Builder:
    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def build(self) -> Iterator[Param]:
        embed, vocab = (Axis.EMBED,), (Axis.VOCAB,)
        yield self.param(EMBED_TOKENS, (vocab, embed), "embedding")
        for layer in range(self.spec.num_hidden_layers):
            yield from self.decoder_layer(layer)
        yield self.param(FINAL_NORM, (embed,), "norm")
        if not self.spec.tie_word_embeddings:
            yield self.param(LM_HEAD, (vocab, embed), "head")

    def param(
        self,
        name: str,
        dims: tuple[Dim, ...],
        kind: Kind,
        layer: int | None = None,
        expert: int | None = None,
    ) -> Param:
        init: Init = "ones" if kind == "norm" else "zeros" if kind == "bias" else "normal"
        shape = tuple(prod(axis_size(self.spec, axis) for axis in dim) for dim in dims)
        return Param(
            name=name, dims=dims, shape=shape, kind=kind, init=init, layer=layer, expert=expert
        )

    def decoder_layer(self, layer: int) -> Iterator[Param]:
        prefix = f"model.layers.{layer}."
        embed = (Axis.EMBED,)
        yield self.param(prefix + "input_layernorm.weight", (embed,), "norm", layer)
        for name, heads in (("q", Axis.HEADS), ("k", Axis.KV_HEADS), ("v", Axis.KV_HEADS)):
            out = (heads, Axis.HEAD)
            stem = f"{prefix}self_attn.{name}_proj."
            yield self.param(stem + "weight", (out, embed), "linear", layer)
            yield self.param(stem + "bias", (out,), "bias", layer)
        yield self.param(
            prefix + "self_attn.o_proj.weight", (embed, (Axis.HEADS, Axis.HEAD)), "linear", layer
        )
        yield self.param(prefix + "post_attention_layernorm.weight", (embed,), "norm", layer)
        if self.spec.moe is not None and self.spec.moe.is_sparse(layer):
            yield from self.sparse_mlp(prefix + "mlp.", layer, self.spec.moe)
        else:
            yield from self.gated_mlp(prefix + "mlp.", Axis.FFN, layer)

    def gated_mlp(
        self, prefix: str, ffn: Axis, layer: int, expert: int | None = None
    ) -> Iterator[Param]:
        embed = (Axis.EMBED,)
        for name in ("gate_proj", "up_proj"):
            yield self.param(f"{prefix}{name}.weight", ((ffn,), embed), "linear", layer, expert)
        yield self.param(prefix + "down_proj.weight", (embed, (ffn,)), "linear", layer, expert)

    def sparse_mlp(self, prefix: str, layer: int, moe: MoESpec) -> Iterator[Param]:
        embed = (Axis.EMBED,)
        yield self.param(prefix + "gate.weight", ((Axis.EXPERT,), embed), "router", layer)
        for expert in range(moe.num_experts):
            yield from self.gated_mlp(f"{prefix}experts.{expert}.", Axis.EXPERT_FFN, layer, expert)
        yield from self.gated_mlp(prefix + "shared_expert.", Axis.SHARED_FFN, layer)
        yield self.param(
            prefix + "shared_expert_gate.weight", ((Axis.ONE,), embed), "router", layer
        )
