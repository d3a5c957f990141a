"""Which ``config.json`` keys are understood, and how strictly. Tables only, plus the one check.

A key is required, optional, fixed (understood at the one value every Qwen2 checkpoint has) or
inert (never changes the logits: bookkeeping, storage, or decoding defaults that transformers 4
kept here and that ``generation_config.json`` holds today). Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
MOE_REQUIRED = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip
MOE_OPTIONAL = (
    "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "output_router_logits",
    "router_aux_loss_coef",
)  # fmt: skip

_OPTIONAL = {
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
    "rms_norm_eps", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window", "sliding_window",
    "max_window_layers", "layer_types", "dual_chunk_attention_config", "architectures",
    "model_type",
}  # fmt: skip

_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "attention_bias": (True,),
    "qkv_bias": (True,),
    "mlp_bias": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "rope_traditional": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "partial_rotary_factor": (1.0,),
    "logits_scaling": (1.0,),
    "pretraining_tp": (1,),
}

_INERT = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attn_implementation",
    "auto_map", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "is_decoder",
    "label2id", "name_or_path", "output_attentions", "output_hidden_states", "prefix",
    "problem_type", "quantization", "quantization_config", "return_dict", "task_specific_params",
    "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_return_dict",
    "decoder_start_token_id", "sep_token_id", "neftune_noise_alpha",
}  # fmt: skip

_DECODING = {
    "bad_words_ids", "begin_suppress_tokens", "cache_implementation", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k",
    "top_p", "typical_p",
}  # fmt: skip


def key_problems(config: Mapping[str, Any]) -> list[str]:
    """Everything wrong with the keys of ``config`` (its ``model_type`` is already known).

    Returns:
        One phrase per missing, unsupported or unknown key; empty if all is well.
    """
    moe = config["model_type"] == "qwen2_moe"
    required = (*REQUIRED, *(MOE_REQUIRED if moe else ()))
    known = _OPTIONAL | _INERT | _DECODING | set(required) | (set(MOE_OPTIONAL) if moe else set())
    found = [f"missing {key!r}" for key in required if config.get(key) is None]
    for key, value in config.items():
        if value is None:
            continue
        if key in _FIXED:
            if not any(_same(value, allowed) for allowed in _FIXED[key]):
                found.append(f"{key}={value!r} is not supported (expected {_FIXED[key][0]!r})")
        elif key not in known:
            found.append(f"unknown key {key!r}: it may change what the model computes")
    return [*found, *_architecture_problems(config)]


def _same(value: object, allowed: object) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _architecture_problems(config: Mapping[str, Any]) -> list[str]:
    expected = ARCHITECTURES[config["model_type"]]
    given = config.get("architectures")
    if given is None or given == [expected]:
        return []
    return [f"architectures={given!r} is not supported (expected {[expected]!r})"]
