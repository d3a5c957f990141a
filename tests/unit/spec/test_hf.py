"""config.json: the released files, transformers' own writing, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit.spec.hf import from_hf_config, to_hf_config
from qwen2kit.spec.model import LinearScaling, ModelSpec, RoPESpec, SlidingWindowSpec, YarnScaling
from qwen2kit.spec.presets import preset
from tests.conftest import small_spec
from tests.unit.spec.test_schema import SMALL_MOE

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64)
SPECS = {
    "tied": small_spec(),
    "untied": small_spec(tied=False),
    "yarn": small_spec(rope=RoPESpec(rope_theta=1e6, scaling=YARN)),
    "linear": small_spec(rope=RoPESpec(scaling=LinearScaling(factor=2.0))),
    "window": small_spec(
        window=SlidingWindowSpec(enabled=True, sliding_window=16, max_window_layers=2)
    ),
    "wide heads": small_spec(head_dim=32),
    "moe": small_spec(moe=SMALL_MOE),
    "eos list": small_spec(eos_token_id=(7, 9), pad_token_id=9),
}


def load(name: str) -> dict[str, Any]:
    path = next(path for path in CONFIGS if path.stem == name)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_released_configs_are_read_completely(path: Path) -> None:
    config = json.loads(path.read_text())
    written = to_hf_config(from_hf_config(config), dtype=config["torch_dtype"])
    ignored = {"transformers_version", "rope_scaling", "use_mrope"}
    assert {k: v for k, v in config.items() if k not in ignored} == {
        key: written[key] for key in config if key not in ignored
    }


@pytest.mark.parametrize(
    ("name", "preset_name"),
    [
        ("qwen2-0.5b", "qwen2-0.5b"),
        ("qwen2-72b", "qwen2-72b"),
        ("qwen2-57b-a14b", "qwen2-57b-a14b"),
    ],
)
def test_presets_are_the_released_base_configs(name: str, preset_name: str) -> None:
    assert from_hf_config(load(name)) == preset(preset_name)


def test_special_releases() -> None:
    million = from_hf_config(load("qwen2.5-7b-instruct-1m"))
    assert million.dual_chunk is not None
    assert (million.dual_chunk.chunk_size, million.dual_chunk.local_size) == (262144, 8192)
    assert million.rope == RoPESpec(rope_theta=1e7)
    assert from_hf_config(load("qwen2.5-math-1.5b")).rope == RoPESpec(rope_theta=1e4)
    yarn = from_hf_config(load("qwen2-72b-instruct-yarn")).rope.scaling
    assert yarn == YarnScaling(factor=4.0, original_max_position_embeddings=32768)
    assert from_hf_config(load("qwen1.5-7b")).num_key_value_groups == 1


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_round_trip_keeps_the_spec(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(to_hf_config(spec, dtype="float32")))
    assert from_hf_config(config) == spec


def test_each_spelling_of_rope_alone_gives_the_same_spec() -> None:
    spec = SPECS["yarn"]
    both = to_hf_config(spec, dtype="float32")
    modern = {k: v for k, v in both.items() if k not in ("rope_theta", "rope_scaling")}
    legacy = {k: v for k, v in both.items() if k != "rope_parameters"}
    old_type = legacy | {"rope_scaling": dict(legacy["rope_scaling"])}
    del old_type["rope_scaling"]["rope_type"]
    assert from_hf_config(modern) == from_hf_config(legacy) == from_hf_config(old_type) == spec


def test_absent_keys_take_transformers_defaults() -> None:
    transformers = pytest.importorskip("transformers")
    required = {
        "model_type": "qwen2", "vocab_size": 199, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    spec = from_hf_config(required)
    theirs = transformers.Qwen2Config(num_key_value_heads=None, **required)
    assert spec.num_key_value_heads == theirs.num_key_value_heads
    for key in ("rms_norm_eps", "initializer_range", "tie_word_embeddings",
                "max_position_embeddings", "bos_token_id", "eos_token_id"):  # fmt: skip
        assert getattr(spec, key) == getattr(theirs, key)
    assert spec.rope.rope_theta == theirs.rope_parameters["rope_theta"]


def unknown(config: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        from_hf_config(config | changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not of the Qwen2 family"),
        ({"model_type": ["qwen2"]}, "is not of the Qwen2 family"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures="),
        ({"logit_softcap": 30.0}, "unknown key 'logit_softcap'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": False}, "attention_bias=False is not supported"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"hidden_size": None}, "missing 'hidden_size'"),
        ({"hidden_size": "896"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "x"}, "eos_token_id must be an integer or a list"),
        ({"eos_token_id": [1, None]}, "eos_token_id must be an integer or a list"),
        ({"bos_token_id": [1]}, "bos_token_id must be an integer"),
        ({"sliding_window": "big"}, "sliding_window must be an integer"),
        ({"use_sliding_window": True, "max_window_layers": None}, "must be given"),
        ({"use_sliding_window": True, "sliding_window": None}, "must be given"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types contradicts"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "contradicts rope_type"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "factor"),
        ({"rope_scaling": "yarn"}, "must be an object"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters contradicts"),
        ({"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 4, "x": 1}}, "'x'"),
        ({"dual_chunk_attention_config": 5}, "must be an object"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    assert message in unknown(load("qwen2-0.5b"), **changes)


def test_yarn_options_are_checked() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for bad in ({"beta_fast": "32"}, {"attention_factor": -1}, {"truncate": 1}, {"extra": 1}):
        text = unknown(load("qwen2-0.5b"), rope_scaling=yarn | bad)
        assert next(iter(bad)) in text


def test_all_problems_are_in_one_line() -> None:
    text = unknown(load("qwen2-0.5b"), alpha=1, beta=2, hidden_act="relu", vocab_size=None)
    assert "\n" not in text
    assert all(word in text for word in ("'alpha'", "'beta'", "hidden_act", "vocab_size"))


def test_moe_keys() -> None:
    moe = load("qwen2-57b-a14b")
    assert "mlp_only_layers must list" in unknown(moe, mlp_only_layers="1,2")
    assert "decoder_sparse_step must be positive" in unknown(moe, decoder_sparse_step=0)
    assert "missing 'num_experts'" in unknown(moe, num_experts=None)
    assert "unknown key 'num_experts'" in unknown(load("qwen2-0.5b"), num_experts=64)
    assert from_hf_config(moe | {"mlp_only_layers": [0, 3]}).moe.mlp_only_layers == (0, 3)  # type: ignore[union-attr]


def test_not_an_object() -> None:
    with pytest.raises(ConfigError, match="must hold an object"):
        from_hf_config([1, 2])  # type: ignore[arg-type]
