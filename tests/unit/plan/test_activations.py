"""Predicted activations against what PyTorch's autograd saves of a real training step.

Layers are compiled with the partitioner that inductor uses, which decides what is saved, but
without its code generator.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan, LoRAPlan, Recompute, TrainPlan
from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.backend.registry import get
from qwen2kit.plan import activations
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.workload import Workload
from qwen2kit.spec.model import ModelSpec
from tests.conftest import random_weights, small_spec
from tests.unit.plan.workloads import LORA, NF4, workload

torch = pytest.importorskip("torch")

ROWS, LENGTH = 2, 128
TOKENS = ROWS * LENGTH


@pytest.fixture(autouse=True)
def _small_and_uncompiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    partition = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", partition)
    yield
    torch.set_num_threads(threads)


def spec(layers: int) -> ModelSpec:
    """All widths differ, so that none can stand for another."""
    return small_spec(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
    )


def batch() -> TokenBatch:
    tokens = np.random.default_rng(0).integers(0, 512, (ROWS, LENGTH), dtype=np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return TokenBatch(
        tokens=tokens, labels=tokens, positions=positions, documents=np.zeros_like(tokens)
    )


def saved_bytes(layers: int, plan: TrainPlan, dtype: str) -> int:
    """Bytes that autograd saves in the forward pass of a step, parameters left out."""
    torch._dynamo.reset()
    model: Any = get("torch").compile(
        spec(layers),
        ExecutionPlan(device="cpu", dtype=dtype, train=replace(plan, micro_batch_rows=ROWS)),
    )
    model.load(random_weights(spec(layers)))
    model.train_step(batch(), 0.0)  # compiles
    own = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train_step(batch(), 0.0)
    return sum(storage.nbytes() for storage in kept.values())


def layer_bytes(plan: TrainPlan, dtype: str) -> tuple[int, float]:
    """What one decoder layer keeps: in PyTorch, and as predicted."""
    measured = saved_bytes(3, plan, dtype) - saved_bytes(2, plan, dtype)
    step: Workload = workload(spec(3), seq_len=LENGTH, batch_rows=ROWS, dtype=dtype)
    step = replace(step, plan=replace(plan, micro_batch_rows=ROWS))
    return measured, activations.layer_kept(step, 0) + activations.weight_copies(step, 0)


# The cache of selective recomputation is invisible to hooks unless compiled.
FULL = [
    case
    for case in product(("none", "selective", "full"), ("bfloat16", "float32"), (True, False))
    if case[0] != "selective" or case[2]
]


@pytest.mark.parametrize(("recompute", "dtype", "compiled"), FULL)
def test_layer(recompute: Recompute, dtype: str, compiled: bool) -> None:
    measured, predicted = layer_bytes(TrainPlan(recompute=recompute, compile=compiled), dtype)
    if recompute == "full" and compiled:
        measured -= 5056  # the state of the CPU's random generator
    assert measured == predicted


@pytest.mark.parametrize("adapter", [LORA, NF4], ids=["lora", "nf4"])
@pytest.mark.parametrize(
    ("recompute", "compiled"), [("none", True), ("none", False), ("selective", True)]
)
def test_layer_with_adapters(adapter: LoRAPlan, recompute: Recompute, compiled: bool) -> None:
    plan = TrainPlan(recompute=recompute, compile=compiled, adapter=replace(adapter, rank=8))
    measured, predicted = layer_bytes(plan, "bfloat16")
    assert measured == predicted


def test_selective_recomputation_keeps_less_with_adapters_too() -> None:
    none, selective, full = (
        activations.layer_kept(workload("qwen2-7b", recompute=mode, adapter=LORA), 0)
        for mode in ("none", "selective", "full")
    )
    assert full < selective < 0.75 * none


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_head(dtype: str) -> None:
    """What is kept besides the layers. The final norm's output is no longer needed by autograd
    once the loss is there, but it is while the loss is computed."""
    plan = TrainPlan(compile=False, loss_chunk_tokens=64)
    one, two = saved_bytes(1, plan, dtype), saved_bytes(2, plan, dtype)
    rotary = 2 * 1024 * 32 * (2 if dtype == "bfloat16" else 4)
    ids, statistics, head_gradient = 8 * TOKENS, 4 * TOKENS, 4 * 512 * 96
    measured = one - (two - one) - rotary - ids - statistics - head_gradient
    step = workload(spec(1), seq_len=LENGTH, batch_rows=ROWS, dtype=dtype)
    step = replace(step, plan=replace(plan, micro_batch_rows=ROWS))
    output = 4 * 96 * TOKENS
    assert measured == activations.head_kept(step) - output


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tensor_parallelism_divides(recompute: Recompute) -> None:
    divided = workload("qwen2-7b", Degrees(tp=4, dp_shard=2), recompute=recompute)
    sharded = workload("qwen2-7b", Degrees(dp_shard=2), recompute=recompute)
    assert activations.layer_kept(divided, 0) < activations.layer_kept(sharded, 0)
    # Inputs of products are gathered, so no more than a quarter can be saved.
    assert activations.layer_kept(divided, 0) >= activations.layer_kept(sharded, 0) / 8


def test_context_parallelism_divides_all_but_keys_and_values() -> None:
    one = workload("qwen2-7b", Degrees(dp_shard=8), seq_len=8192)
    four = workload("qwen2-7b", Degrees(dp_shard=8, cp=4), seq_len=8192)
    keys_and_values = 2 * 2 * 4 * 128 * 8192
    quarter = (activations.layer_kept(one, 0) - keys_and_values) / 4
    assert activations.layer_kept(four, 0) == quarter + keys_and_values


def test_a_sparse_layer_counts_its_chosen_experts() -> None:
    dense, sparse = workload("qwen2-7b"), workload("qwen2-57b-a14b")
    # 8 experts of 2,560 and a shared one of 20,480 against 18,944.
    wider = activations.layer_kept(sparse, 0) / activations.layer_kept(dense, 0)
    assert 1.5 < wider < (8 * 2560 + 20480) / 18944
