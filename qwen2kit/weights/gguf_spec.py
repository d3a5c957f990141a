"""GGUF metadata <-> ModelSpec, strict both ways like `spec.hf`.

Keys are llama.cpp's: ``<arch>.block_count`` and so on, ``arch`` being qwen2 or qwen2moe. An
``<arch>.*`` key that is not understood is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import (
    LinearScaling,
    ModelSpec,
    MoESpec,
    RoPESpec,
    SlidingWindowSpec,
    YarnScaling,
)

ARCHITECTURES = {"qwen2": "qwen2", "qwen2_moe": "qwen2moe"}

_KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_weights_norm",
    "tensor_data_layout",
}  # fmt: skip


def spec_from_gguf(fields: Mapping[str, Any], *, vocab_size: int, tied: bool) -> ModelSpec:
    """The spec that GGUF metadata describes.

    Args:
        fields: metadata as plain values.
        vocab_size: rows of the embedding (metadata rarely has it).
        tied: whether the output head is the embedding.

    Raises:
        ConfigError: the architecture is not of the Qwen2 family, a key is missing, has the wrong
            type, contradicts another, or is unknown.
    """
    reader = _Reader(fields)
    hidden, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    head_dim = reader.integer("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if reader.integer(key, head_dim) != head_dim:
            raise ConfigError(f"GGUF: {reader.arch}.{key} differs from the head size {head_dim}")
    moe = _read_moe(reader) if reader.arch == "qwen2moe" else None
    intermediate = reader.integer("feed_forward_length", moe.moe_intermediate_size if moe else None)
    layers = reader.integer("block_count")
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=reader.integer("context_length"),
        rms_norm_eps=reader.number("attention.layer_norm_rms_epsilon"),
        rope=RoPESpec(
            rope_theta=reader.number("rope.freq_base", 10_000.0), scaling=_scaling(reader)
        ),
        window=SlidingWindowSpec(max_window_layers=layers),
        moe=moe,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def spec_to_gguf(spec: ModelSpec) -> dict[str, Any]:
    """Metadata ``{suffix: value}`` of ``spec``, without the ``<arch>.`` prefix.

    Raises:
        ConfigError: the spec uses something GGUF cannot say (an enabled sliding window, dual
            chunk attention, YaRN options beyond factor and betas, normalised expert weights).
    """
    _refuse_inexpressible(spec)
    values: dict[str, Any] = {
        "block_count": spec.num_hidden_layers,
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "rope.freq_base": spec.rope.rope_theta,
        "vocab_size": spec.vocab_size,
    }
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        values |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    scaling = spec.rope.scaling
    if scaling is not None:
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        original = scaling.original_max_position_embeddings
        values["rope.scaling.original_context_length"] = original
        if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            values["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
            values["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    if spec.moe is not None:
        values |= {
            "expert_count": spec.moe.num_experts,
            "expert_used_count": spec.moe.num_experts_per_tok,
            "expert_feed_forward_length": spec.moe.moe_intermediate_size,
            "expert_shared_feed_forward_length": spec.moe.shared_expert_intermediate_size,
        }
    return values


class _Reader:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.arch = fields.get("general.architecture")
        if self.arch not in ARCHITECTURES.values():
            raise ConfigError(
                f"GGUF: architecture {self.arch!r} is not of the Qwen2 family; expected one of: "
                + ", ".join(ARCHITECTURES.values())
            )
        prefix = f"{self.arch}."
        unknown = sorted(
            key for key in fields if key.startswith(prefix) and key[len(prefix) :] not in _KNOWN
        )
        if unknown:
            raise ConfigError(
                f"GGUF: unknown metadata {', '.join(unknown[:3])}: it may change what the model "
                "computes"
            )

    def get(self, key: str) -> Any:
        return self._fields.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise ConfigError(f"GGUF: {self.arch}.{key} must be an integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float):
            raise ConfigError(f"GGUF: {self.arch}.{key} must be a number, got {value!r}")
        return _shortest(float(value))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32, so that 1e-6 comes back as 1e-6."""
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value


def _scaling(reader: _Reader) -> LinearScaling | YarnScaling | None:
    kind = reader.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"GGUF: RoPE scaling {kind!r} is not supported (none, linear, yarn)")
    factor = reader.number("rope.scaling.factor")
    if kind == "linear":
        return LinearScaling(factor=factor)
    if reader.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ConfigError("GGUF: rope.scaling.attn_factor other than 1 is not supported")
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=reader.integer("rope.scaling.original_context_length"),
        beta_fast=reader.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=reader.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _read_moe(reader: _Reader) -> MoESpec:
    return MoESpec(
        num_experts=reader.integer("expert_count"),
        num_experts_per_tok=reader.integer("expert_used_count"),
        moe_intermediate_size=reader.integer("expert_feed_forward_length"),
        shared_expert_intermediate_size=reader.integer("expert_shared_feed_forward_length"),
        norm_topk_prob=bool(reader.get("expert_weights_norm")),
    )


def _refuse_inexpressible(spec: ModelSpec) -> None:
    problems = []
    if spec.window.enabled:
        problems.append("sliding window attention")
    if spec.dual_chunk is not None:
        problems.append("dual chunk attention")
    yarn = spec.rope.scaling
    if isinstance(yarn, YarnScaling) and (
        (yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim) != (None, None, None)
        or not yarn.truncate
    ):
        problems.append("YaRN attention factors")
    moe = spec.moe
    if moe is not None and (
        moe.norm_topk_prob or moe.mlp_only_layers or moe.decoder_sparse_step != 1
    ):
        problems.append("this mixture-of-experts variant")
    if problems:
        raise ConfigError(f"GGUF cannot express {' and '.join(problems)}; convert to hf or mlx")
