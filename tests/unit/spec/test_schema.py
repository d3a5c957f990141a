"""Names and shapes of the schema against transformers (memory and disk) and mlx-lm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.spec.axes import Axis
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import ModelSpec, MoESpec
from qwen2kit.spec.presets import preset
from qwen2kit.spec.schema import LM_HEAD, axis_size, schema, schema_by_name
from tests.conftest import small_spec

SMALL_MOE = MoESpec(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=48,
    decoder_sparse_step=2,
    mlp_only_layers=(3,),
)


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {param.name: param.shape for param in schema(spec)}


def transformers_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(**to_hf_config(spec, dtype="float32"))
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", ["tiny", "qwen2-0.5b", "qwen2-7b", "qwen2.5-3b", "qwen2-72b"])
def test_dense_presets_equal_transformers(name: str) -> None:
    assert shapes(preset(name)) == transformers_shapes(preset(name))


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_stored_only_when_untied(tied: bool) -> None:
    spec = small_spec(tied=tied)
    assert (LM_HEAD in schema_by_name(spec)) is not tied
    assert shapes(spec) == transformers_shapes(spec)


def test_head_dim_independent_of_hidden_size() -> None:
    spec = small_spec(head_dim=32)
    assert shapes(spec) == transformers_shapes(spec)
    assert schema_by_name(spec)["model.layers.0.self_attn.q_proj.weight"].shape == (128, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_mixture_equals_what_transformers_writes_to_disk(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    spec = small_spec(tied=tied, num_hidden_layers=5, moe=SMALL_MOE)
    config = transformers.Qwen2MoeConfig(**to_hf_config(spec, dtype="float32"))
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes(spec) == written


@pytest.mark.parametrize("tied", [True, False])
def test_dense_equals_mlx_lm(tied: bool) -> None:
    qwen2 = pytest.importorskip("mlx_lm.models.qwen2")
    utils = pytest.importorskip("mlx.utils")
    spec = small_spec(tied=tied)
    model: Any = qwen2.Model(qwen2.ModelArgs.from_dict(to_hf_config(spec, dtype="float32")))
    written = {name: tuple(value.shape) for name, value in utils.tree_flatten(model.parameters())}
    assert shapes(spec) == written


def test_names_are_unique_and_kinds_follow_the_shape() -> None:
    params = schema(small_spec(num_hidden_layers=5, moe=SMALL_MOE))
    assert len({param.name for param in params}) == len(params)
    for param in params:
        assert (param.kind in ("bias", "norm")) == (len(param.shape) == 1)
        assert param.decays == (len(param.shape) == 2)
        assert param.init == {"norm": "ones", "bias": "zeros"}.get(param.kind, "normal")
        assert param.quantizable == (param.kind in ("linear", "embedding", "head"))


def test_axes_give_the_shape() -> None:
    spec = small_spec(num_hidden_layers=5, moe=SMALL_MOE)
    by_name = schema_by_name(spec)
    key = by_name["model.layers.0.self_attn.k_proj.weight"]
    assert key.dims == ((Axis.KV_HEADS, Axis.HEAD), (Axis.EMBED,))
    assert key.shape == (2 * 16, 64)
    expert = by_name["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert (expert.dims, expert.shape) == (((Axis.EMBED,), (Axis.EXPERT_FFN,)), (64, 24))
    assert (expert.layer, expert.expert) == (1, 2)


def test_expert_axis_of_a_dense_spec_is_an_error() -> None:
    with pytest.raises(KeyError):
        axis_size(small_spec(), Axis.EXPERT)


def test_sparse_layers_follow_step_and_exceptions() -> None:
    spec = small_spec(num_hidden_layers=6, moe=SMALL_MOE)
    assert [spec.is_sparse(layer) for layer in range(6)] == [
        False, True, False, False, False, True,
    ]  # fmt: skip
    assert not any(replace(spec, moe=None).is_sparse(layer) for layer in range(6))
