"""What transformers writes we read; what we write transformers and mlx-lm read the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.spec.hf import from_hf_config, to_hf_config
from qwen2kit.spec.model import ModelSpec, YarnScaling
from tests.conftest import small_spec
from tests.unit.spec.test_hf import CONFIGS, SPECS

transformers = pytest.importorskip("transformers")

TRANSFORMERS_4_DEFAULTS = {
    # Every key that PretrainedConfig.to_dict() of transformers 4 adds on top of the model's own.
    "return_dict": True, "output_hidden_states": False, "output_attentions": False,
    "torchscript": False, "torch_dtype": "bfloat16", "use_bfloat16": False,
    "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
    "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None, "prefix": None, "sep_token_id": None, "decoder_start_token_id": None,
    "task_specific_params": None, "problem_type": None, "_name_or_path": "Qwen/Qwen2-0.5B",
    "_attn_implementation_autoset": True,
}  # fmt: skip


def their_config(spec: ModelSpec, **changes: Any) -> Any:
    config = to_hf_config(spec, dtype="float32") | changes
    kind = transformers.Qwen2Config if spec.moe is None else transformers.Qwen2MoeConfig
    return kind(**{key: value for key, value in config.items() if key != "model_type"})


def normalised(spec: ModelSpec) -> ModelSpec:
    """transformers drops ``sliding_window`` while it is disabled; nothing else may differ."""
    from dataclasses import replace

    if spec.window.enabled:
        return spec
    return replace(spec, window=replace(spec.window, sliding_window=None))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("full", [False, True], ids=["diff", "full"])
def test_config_saved_by_transformers_is_read(spec: ModelSpec, full: bool, tmp_path: Path) -> None:
    config = their_config(spec)
    config.to_json_file(tmp_path / "config.json", use_diff=not full)
    read = from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    assert normalised(read) == normalised(spec)


def test_model_saved_by_transformers_is_read(tmp_path: Path) -> None:
    spec = small_spec()
    model = transformers.Qwen2ForCausalLM(their_config(spec))
    model.save_pretrained(tmp_path)
    assert from_hf_config(json.loads((tmp_path / "config.json").read_text())) == spec


def test_every_default_key_of_transformers_4_is_accepted() -> None:
    config = json.loads(CONFIGS[0].read_text())
    assert from_hf_config(TRANSFORMERS_4_DEFAULTS | config) == from_hf_config(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_released_config_through_transformers_and_back(path: Path, tmp_path: Path) -> None:
    ours = from_hf_config(json.loads(path.read_text()))
    loaded = transformers.AutoConfig.from_pretrained(path)
    loaded.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert normalised(from_hf_config(saved)) == normalised(ours)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_auto_config_reads_ours_with_the_same_meaning(spec: ModelSpec, tmp_path: Path) -> None:
    config = to_hf_config(spec, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == spec.rope.rope_theta
    assert rope["rope_type"] == (spec.rope.scaling.kind if spec.rope.scaling else "default")
    if isinstance(spec.rope.scaling, YarnScaling):
        assert rope["factor"] == spec.rope.scaling.factor
        assert rope["original_max_position_embeddings"] == 64
    assert theirs.tie_word_embeddings == spec.tie_word_embeddings
    assert theirs.use_sliding_window == spec.window.enabled
    assert theirs.layer_types == [
        "sliding_attention" if spec.window_of(layer) else "full_attention"
        for layer in range(spec.num_hidden_layers)
    ]
    eos = spec.eos_token_id
    assert theirs.eos_token_id == (list(eos) if isinstance(eos, tuple) else eos)
    assert str(theirs.dtype).endswith("bfloat16")


@pytest.mark.parametrize("name", ["tied", "untied", "yarn", "linear"])
def test_mlx_lm_reads_ours_with_the_same_meaning(name: str) -> None:
    qwen2 = pytest.importorskip("mlx_lm.models.qwen2")
    spec = SPECS[name]
    args = qwen2.ModelArgs.from_dict(to_hf_config(spec, dtype="bfloat16"))
    assert args.rope_theta == spec.rope.rope_theta
    assert args.tie_word_embeddings == spec.tie_word_embeddings
    assert args.num_key_value_heads == spec.num_key_value_heads
    if spec.rope.scaling is None:
        assert args.rope_scaling is None
    else:
        assert args.rope_scaling["type"] == spec.rope.scaling.kind
        assert args.rope_scaling["factor"] == spec.rope.scaling.factor
