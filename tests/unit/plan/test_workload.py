"""What a process holds: nothing is lost or counted twice, and real tensors are of that size."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.sharding import local_shape, tensor_dim
from qwen2kit.plan.stages import stages
from qwen2kit.plan.workload import (
    NF4_BYTES,
    adapted,
    held,
    layer_kinds,
    matrices,
    share,
    trainable_parameters,
)
from qwen2kit.spec.counts import count_params
from qwen2kit.spec.model import MoESpec, SlidingWindowSpec
from qwen2kit.spec.presets import PRESETS, preset
from qwen2kit.spec.schema import EMBED_TOKENS, schema, schema_by_name
from tests.conftest import random_weights, small_spec
from tests.unit.plan.workloads import LORA, NF4, workload


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    shards=st.integers(1, 40),
)
def test_fsdp_loses_no_element(shape: tuple[int, ...], shards: int) -> None:
    pieces = [held(shape, shards, rank) for rank in range(shards)]
    assert sum(pieces) == prod(shape)
    assert pieces[0] == max(pieces)


@pytest.mark.parametrize(("shape", "shards"), [((10, 4), 4), ((3,), 8), ((7, 2), 2), ((64, 5), 6)])
def test_fsdp_pieces_are_those_of_torch_chunk(shape: tuple[int, ...], shards: int) -> None:
    torch = pytest.importorskip("torch")
    chunks = torch.chunk(torch.zeros(shape), shards)
    sizes = [chunk.numel() for chunk in chunks] + [0] * (shards - len(chunks))
    assert [held(shape, shards, rank) for rank in range(shards)] == sizes


@given(
    tied=st.booleans(),
    tp=st.sampled_from([1, 2]),
    pp=st.integers(1, 3),
    shards=st.integers(1, 9),
)
def test_all_processes_together_hold_the_model(tied: bool, tp: int, pp: int, shards: int) -> None:
    """Over all stages and ranks every parameter is there once; replicated ones once per tp rank,
    and a tied embedding once more in a pipeline."""
    spec = small_spec(tied=tied, vocab_size=200)
    total = 0
    for stage in stages(spec, pp):
        for param in schema(spec):
            if stage.owns(spec, param):
                shape = local_shape(param, tp)
                total += tp * sum(held(shape, shards, rank) for rank in range(shards))
    replicated = sum(p.size for p in schema(spec) if tensor_dim(p) is None)
    copy = schema_by_name(spec)[EMBED_TOKENS].size if tied and pp > 1 else 0
    assert total == count_params(spec).total + (tp - 1) * replicated + copy


@given(pp=st.integers(1, 3), shards=st.integers(1, 9), tp=st.sampled_from([1, 2]))
def test_share_is_the_sum_over_the_schema(pp: int, shards: int, tp: int) -> None:
    spec = small_spec(tied=False, vocab_size=200)
    step = workload(spec, Degrees(pp=pp, dp_shard=shards, tp=tp))
    for stage in step.stages:
        params = [p for p in schema(spec) if stage.owns(spec, p)]
        mine = share(step, stage)
        assert mine.trainable == sum(held(local_shape(p, tp), shards) for p in params)
        assert mine.weight_bytes == 4 * mine.trainable
        in_layers = {p.layer: 0 for p in params if p.layer is not None}
        for p in params:
            if p.layer is not None:
                in_layers[p.layer] += prod(local_shape(p, tp))
        assert mine.layer == max(in_layers.values())
        assert mine.layers == len(in_layers)
        assert mine.root == sum(prod(local_shape(p, tp)) for p in params if p.layer is None)


@pytest.mark.parametrize("name", PRESETS)
def test_one_process_trains_every_parameter(name: str) -> None:
    step = workload(name)
    (stage,) = step.stages
    total = count_params(step.spec).total
    assert share(step, stage).trainable == total
    assert trainable_parameters(step.spec, None) == total


def test_matrices_are_the_products_of_a_token() -> None:
    dense, sparse = preset("qwen2-7b"), preset("qwen2-57b-a14b")
    for spec in (dense, sparse):
        per_layer = sum(rows * columns for rows, columns in matrices(spec, 0, 1))
        vectors = sum(p.size for p in schema(spec) if p.layer == 0 and not p.decays)
        layers = count_params(spec).activated_non_embedding - spec.hidden_size  # final norm
        assert spec.num_hidden_layers * (per_layer + vectors) == layers


def test_layers_that_differ_are_kept_apart() -> None:
    moe = MoESpec(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=(0,),
    )
    window = SlidingWindowSpec(enabled=True, sliding_window=8, max_window_layers=2)
    spec = small_spec(moe=moe, window=window, num_hidden_layers=5)
    (stage,) = stages(spec, 1)
    assert layer_kinds(spec, stage) == ((0, 1), (1, 1), (2, 3))
    (stage,) = stages(preset("qwen2-72b"), 1)
    assert layer_kinds(preset("qwen2-72b"), stage) == ((0, 80),)


def test_adapters_of_qwen2_7b() -> None:
    # rank * (inputs + outputs) over the seven matrices of 28 layers.
    spec = preset("qwen2-7b")
    per_layer = (
        (3584 + 3584) * 2  # q, o
        + (3584 + 512) * 2  # k, v
        + (3584 + 18944) * 3  # gate, up, down
    )
    assert trainable_parameters(spec, LORA) == 28 * 16 * per_layer
    assert len(adapted(spec, LORA, 0)) == 7


@pytest.mark.parametrize("adapter", [None, LORA, NF4], ids=["full", "lora", "nf4"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_torch_model(adapter: Any, tied: bool) -> None:
    """Bytes of parameters, and of what trains, equal those of the model that the backend builds."""
    pytest.importorskip("torch")
    from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
    from qwen2kit.backend.registry import get

    spec = small_spec(tied=tied, vocab_size=192)
    plan = TrainPlan(adapter=adapter, compile=False)
    model: Any = get("torch").compile(
        spec, ExecutionPlan(device="cpu", dtype="bfloat16", train=plan)
    )
    model.load(random_weights(spec))
    parameters = list(model.module.parameters())
    step = workload(spec, adapter=adapter)
    mine = share(step, step.stages[0])
    assert mine.weight_bytes == sum(p.numel() * p.element_size() for p in parameters)
    assert mine.trainable == sum(p.numel() for p in parameters if p.requires_grad)


def test_nf4_is_four_and_a_half_bits() -> None:
    assert NF4_BYTES * 8 == 4.5
