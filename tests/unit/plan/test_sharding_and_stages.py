"""Tensor-parallel dimensions and pipeline cuts follow from the schema."""

from __future__ import annotations

from math import prod

import pytest

from qwen2kit.plan.sharding import local_shape, tensor_dim
from qwen2kit.plan.stages import stage_params, stages
from qwen2kit.spec.presets import preset
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, LM_HEAD, schema, schema_by_name

# Megatron's layout (arXiv 1909.08053), by the last two parts of a parameter's name.
LAYOUT = {
    "q_proj.weight": 0, "q_proj.bias": 0, "k_proj.weight": 0, "k_proj.bias": 0,
    "v_proj.weight": 0, "v_proj.bias": 0, "o_proj.weight": 1,
    "gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1,
    "embed_tokens.weight": 0, "input_layernorm.weight": None,
    "post_attention_layernorm.weight": None, "norm.weight": None, "lm_head.weight": 0,
}  # fmt: skip


@pytest.mark.parametrize("model", ["qwen2-0.5b", "qwen2-72b"])
def test_dimensions_are_megatrons(model: str) -> None:
    for param in schema(preset(model)):
        assert tensor_dim(param) == LAYOUT[".".join(param.name.split(".")[-2:])]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_add_up(tp: int) -> None:
    for param in schema(preset("qwen2-72b")):
        share = prod(local_shape(param, tp))
        assert share == (param.size if tensor_dim(param) is None else param.size // tp)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("model", ["qwen2-0.5b", "qwen2-7b"])
def test_every_layer_is_on_one_stage(model: str, count: int) -> None:
    spec = preset(model)
    cut = stages(spec, count)
    layers = [layer for stage in cut for layer in stage.layers]
    assert layers == list(range(spec.num_hidden_layers))
    lengths = [len(stage.layers) for stage in cut]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_a_tied_embedding_is_on_both_ends() -> None:
    tied, untied = preset("qwen2-0.5b"), preset("qwen2-7b")
    holders = {
        (spec.tie_word_embeddings, name): [
            stage.index for stage in stages(spec, 4) if stage.owns(spec, schema_by_name(spec)[name])
        ]
        for spec in (tied, untied)
        for name in (EMBED_TOKENS, FINAL_NORM, LM_HEAD)
        if name in schema_by_name(spec)
    }
    assert holders == {
        (True, EMBED_TOKENS): [0, 3],
        (True, FINAL_NORM): [3],
        (False, EMBED_TOKENS): [0],
        (False, FINAL_NORM): [3],
        (False, LM_HEAD): [3],
    }


def test_stages_hold_every_parameter() -> None:
    spec = preset("qwen2-7b")
    names = [param.name for stage in stages(spec, 4) for param in stage_params(spec, stage)]
    assert sorted(names) == sorted(param.name for param in schema(spec))
