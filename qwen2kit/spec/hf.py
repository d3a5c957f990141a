"""Hugging Face ``config.json`` <-> ModelSpec, strict both ways.

Reading accepts the legacy spelling (``rope_theta`` + ``rope_scaling``) and the transformers-5
spelling (``rope_parameters``); writing emits both, because mlx-lm, llama.cpp and older vLLM read
only the first. A key that could change the computation and is not understood is refused by name;
nothing is filtered away silently. Quantisation entries are not read here: they describe storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2kit.errors import ConfigError
from qwen2kit.spec.hf_rope import read_rope, write_rope
from qwen2kit.spec.model import DualChunkSpec, ModelSpec, MoESpec, SlidingWindowSpec

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}

# Keys that never change what the model computes at inference.
_INERT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward", "dtype", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "name_or_path", "output_attentions", "output_hidden_states", "problem_type",
    "quantization", "quantization_config", "return_dict", "task_specific_params", "torch_dtype",
    "torchscript", "transformers_version", "use_cache", "use_return_dict", "unsloth_version",
}  # fmt: skip

# Keys that are understood only at the one value every Qwen2 checkpoint has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "attention_bias": (True,),
    "qkv_bias": (True,),
    "mlp_bias": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "rope_traditional": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1, 1.0),
    "logits_scaling": (1, 1.0),
}

_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_OPTIONAL = {
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
    "rms_norm_eps", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window", "sliding_window",
    "max_window_layers", "layer_types", "dual_chunk_attention_config",
}  # fmt: skip
_MOE = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip
_MOE_OPTIONAL = {
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef",
    "output_router_logits",
}  # fmt: skip


def from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """Read a ``config.json`` mapping.

    Raises:
        ConfigError: not a Qwen2-family config; a required key is missing or has the wrong type;
            a key that may change the computation is unknown. All problems are in one message.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model_type {model_type!r} is not of the Qwen2 family; expected one of: "
            + ", ".join(ARCHITECTURES)
        )
    problems = _problems(config, moe=model_type == "qwen2_moe")
    if problems:
        raise ConfigError("config.json: " + "; ".join(problems))
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    layers = _integer(config, "num_hidden_layers")
    spec = ModelSpec(
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_integer(config, "num_key_value_heads", heads),
        head_dim=_integer(config, "head_dim", hidden // max(heads, 1)),
        tie_word_embeddings=_boolean(config, "tie_word_embeddings", False),
        max_position_embeddings=_integer(config, "max_position_embeddings", 32768),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        initializer_range=_number(config, "initializer_range", 0.02),
        rope=read_rope(config),
        window=_read_window(config),
        dual_chunk=_read_dual_chunk(config),
        moe=_read_moe(config) if model_type == "qwen2_moe" else None,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=_read_eos(config.get("eos_token_id")),
        pad_token_id=config.get("pad_token_id"),
    )
    _check_layer_types(spec, config.get("layer_types"))
    return spec


def to_hf_config(spec: ModelSpec, *, dtype: str) -> dict[str, Any]:
    """Write ``spec`` as a ``config.json`` mapping; ``dtype`` is the stored weights' long name."""
    window = spec.window
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.model_type]],
        "model_type": spec.model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "initializer_range": spec.initializer_range,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "use_sliding_window": window.enabled,
        "sliding_window": window.sliding_window,
        "max_window_layers": window.max_window_layers,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_id)
        if isinstance(spec.eos_token_id, tuple)
        else spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **write_rope(spec.rope),
    }
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        config["head_dim"] = spec.head_dim
    if spec.dual_chunk is not None:
        config["dual_chunk_attention_config"] = _write_dual_chunk(spec.dual_chunk)
    if spec.moe is not None:
        config |= {key: getattr(spec.moe, key) for key in (*_MOE, *sorted(_MOE_OPTIONAL))}
        config["mlp_only_layers"] = list(spec.moe.mlp_only_layers)
        config["qkv_bias"] = True
    return config


def _problems(config: Mapping[str, Any], *, moe: bool) -> list[str]:
    required = (*_REQUIRED, *(_MOE if moe else ()))
    known = _INERT | set(_FIXED) | set(required) | _OPTIONAL | (_MOE_OPTIONAL if moe else set())
    found = [f"missing {key!r}" for key in required if config.get(key) is None]
    for key, value in config.items():
        if key in _FIXED and value is not None and value not in _FIXED[key]:
            found.append(f"{key}={value!r} is not supported (expected {_FIXED[key][0]!r})")
        elif key not in known and value is not None:
            found.append(f"unknown key {key!r}: it may change what the model computes")
    return found


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _read_eos(value: object) -> int | tuple[int, ...] | None:
    if isinstance(value, list):
        return tuple(int(item) for item in value)
    if value is None or isinstance(value, int):
        return value
    raise ConfigError(f"config.json: eos_token_id must be an integer or a list, got {value!r}")


def _read_window(config: Mapping[str, Any]) -> SlidingWindowSpec:
    layers = _integer(config, "num_hidden_layers")
    enabled = _boolean(config, "use_sliding_window", False)
    length = config.get("sliding_window")
    if enabled and not (isinstance(length, int) and length > 0):
        raise ConfigError(
            f"config.json: use_sliding_window is true but sliding_window is {length!r}"
        )
    return SlidingWindowSpec(
        enabled=enabled,
        sliding_window=length,
        max_window_layers=_integer(config, "max_window_layers", layers),
    )


def _check_layer_types(spec: ModelSpec, layer_types: object) -> None:
    if layer_types is None:
        return
    expected = [
        "full_attention" if spec.window_of(layer) is None else "sliding_attention"
        for layer in range(spec.num_hidden_layers)
    ]
    if layer_types != expected:
        raise ConfigError(
            "config.json: layer_types contradicts use_sliding_window and max_window_layers"
        )


def _read_dual_chunk(config: Mapping[str, Any]) -> DualChunkSpec | None:
    value = config.get("dual_chunk_attention_config")
    if value is None:
        return None
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    unknown = set(value) - known
    if unknown:
        raise ConfigError(
            f"config.json: unknown keys in dual_chunk_attention_config: {sorted(unknown)}"
        )
    return DualChunkSpec(
        chunk_size=_integer(value, "chunk_size"),
        local_size=_integer(value, "local_size"),
        original_max_position_embeddings=value.get("original_max_position_embeddings"),
    )


def _write_dual_chunk(dual: DualChunkSpec) -> dict[str, int]:
    config = {"chunk_size": dual.chunk_size, "local_size": dual.local_size}
    if dual.original_max_position_embeddings is not None:
        config["original_max_position_embeddings"] = dual.original_max_position_embeddings
    return config


def _read_moe(config: Mapping[str, Any]) -> MoESpec:
    return MoESpec(
        num_experts=_integer(config, "num_experts"),
        num_experts_per_tok=_integer(config, "num_experts_per_tok"),
        moe_intermediate_size=_integer(config, "moe_intermediate_size"),
        shared_expert_intermediate_size=_integer(config, "shared_expert_intermediate_size"),
        norm_topk_prob=_boolean(config, "norm_topk_prob", False),
        decoder_sparse_step=_integer(config, "decoder_sparse_step", 1),
        mlp_only_layers=tuple(config.get("mlp_only_layers") or ()),
        router_aux_loss_coef=_number(config, "router_aux_loss_coef", 0.001),
        output_router_logits=_boolean(config, "output_router_logits", False),
    )
