"""Hugging Face ``config.json`` <-> ModelSpec, strict both ways.

Reading accepts the legacy spelling (``rope_theta`` + ``rope_scaling``) and the transformers-5
spelling (``rope_parameters``); writing emits both, because mlx-lm, llama.cpp and older vLLM read
only the first. A key that could change the computation and is not understood is refused by name;
nothing is filtered away silently. Quantisation entries are not read here: they describe storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from qwen2kit.errors import ConfigError
from qwen2kit.spec.hf_keys import ARCHITECTURES, MOE_OPTIONAL, MOE_REQUIRED, key_problems
from qwen2kit.spec.hf_rope import read_rope, write_rope
from qwen2kit.spec.model import DualChunkSpec, ModelSpec, MoESpec, SlidingWindowSpec


def from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """Read a ``config.json`` mapping.

    Raises:
        ConfigError: not a Qwen2-family config; a required key is missing or has the wrong type;
            a key that may change the computation is unknown. All problems are in one message.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"config.json must hold an object, got {type(config).__name__}")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model_type {model_type!r} is not of the Qwen2 family; expected one of: "
            + ", ".join(ARCHITECTURES)
        )
    problems = key_problems(config)
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
        bos_token_id=_optional_integer(config, "bos_token_id"),
        eos_token_id=_read_eos(config.get("eos_token_id")),
        pad_token_id=_optional_integer(config, "pad_token_id"),
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
    if window.enabled:
        config["layer_types"] = _layer_types(spec)
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        config["head_dim"] = spec.head_dim
    if spec.dual_chunk is not None:
        config["dual_chunk_attention_config"] = _write_dual_chunk(spec.dual_chunk)
    if spec.moe is not None:
        config |= {key: getattr(spec.moe, key) for key in (*MOE_REQUIRED, *MOE_OPTIONAL)}
        config["mlp_only_layers"] = list(spec.moe.mlp_only_layers)
        config["qkv_bias"] = True
    return config


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def _optional_integer(config: Mapping[str, Any], key: str) -> int | None:
    return None if config.get(key) is None else _integer(config, key)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
        raise ConfigError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _read_eos(value: object) -> int | tuple[int, ...] | None:
    if value is None or type(value) is int:
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise ConfigError(
        f"config.json: eos_token_id must be an integer or a list of integers, got {value!r}"
    )


def _read_window(config: Mapping[str, Any]) -> SlidingWindowSpec:
    enabled = _boolean(config, "use_sliding_window", False)
    length = _optional_integer(config, "sliding_window")
    layers = _optional_integer(config, "max_window_layers")
    if enabled and (length is None or layers is None):
        raise ConfigError(
            "config.json: use_sliding_window is true, so sliding_window and max_window_layers "
            f"must be given (they are {length!r} and {layers!r})"
        )
    return SlidingWindowSpec(
        enabled=enabled,
        sliding_window=length,
        max_window_layers=_integer(config, "num_hidden_layers") if layers is None else layers,
    )


def _layer_types(spec: ModelSpec) -> list[str]:
    return [
        "full_attention" if spec.window_of(layer) is None else "sliding_attention"
        for layer in range(spec.num_hidden_layers)
    ]


def _check_layer_types(spec: ModelSpec, layer_types: object) -> None:
    if layer_types is not None and layer_types != _layer_types(spec):
        raise ConfigError(
            "config.json: layer_types contradicts use_sliding_window and max_window_layers"
        )


def _read_dual_chunk(config: Mapping[str, Any]) -> DualChunkSpec | None:
    value = config.get("dual_chunk_attention_config")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"config.json: dual_chunk_attention_config must be an object, got {value!r}"
        )
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    unknown = set(value) - known
    if unknown:
        raise ConfigError(
            f"config.json: unknown keys in dual_chunk_attention_config: {sorted(unknown)}"
        )
    return DualChunkSpec(
        chunk_size=_integer(value, "chunk_size"),
        local_size=_integer(value, "local_size"),
        original_max_position_embeddings=_optional_integer(
            value, "original_max_position_embeddings"
        ),
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
        mlp_only_layers=_read_layers(config.get("mlp_only_layers")),
        router_aux_loss_coef=_number(config, "router_aux_loss_coef", 0.001),
        output_router_logits=_boolean(config, "output_router_logits", False),
    )


def _read_layers(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise ConfigError(f"config.json: mlp_only_layers must list layer numbers, got {value!r}")
    return tuple(value)
