"""Predicted memory: published rules, real tensors, and what must grow or shrink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.memory import PARTS, Memory, in_flight, predict, stage_memory
from qwen2kit.plan.workload import Workload
from qwen2kit.spec.counts import count_params
from tests.conftest import random_weights, small_spec
from tests.unit.plan.workloads import LORA, NF4, workload

GIB = 2**30


def state(memory: Memory) -> int:
    return memory.weights + memory.gradients + memory.optimizer


def fullest(step: Workload) -> int:
    return max(memory.allocated for memory in predict(step))


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen2-7b", "qwen2-72b"])
def test_sixteen_bytes_per_parameter(name: str) -> None:
    """Float32 weights, gradients and two moments (arXiv 1910.02054 counts 16 as well, and 2 more
    for half-precision gradients, which do not exist here)."""
    (memory,) = predict(workload(name, batch_rows=2))
    assert state(memory) == 16 * count_params(workload(name).spec).total


def test_zero_3_divides_everything() -> None:
    """ZeRO's example: 7.5 B parameters on 64 devices need 1.9 GB of state each (figure 1)."""
    (memory,) = predict(workload("qwen2-7b", Degrees(dp_shard=64), batch_rows=128))
    per_device = state(memory) / (count_params(workload("qwen2-7b").spec).total / 7.5e9)
    assert per_device / 1e9 == pytest.approx(7.5e9 * 16 / 64 / 1e9, rel=0.01)
    assert per_device / 1e9 == pytest.approx(1.9, abs=0.05)


def test_qlora_of_7b_fits_a_24_gib_card_and_full_training_does_not() -> None:
    adapters = workload("qwen2-7b", adapter=NF4, seq_len=1024, recompute="full")
    assert fullest(adapters) < 12 * GIB
    assert fullest(workload("qwen2-7b", seq_len=1024, recompute="full")) > 110 * GIB


def test_state_is_that_of_a_torch_step() -> None:
    """Weights, gradients and moments after a real step, byte for byte."""
    torch = pytest.importorskip("torch")
    from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
    from qwen2kit.backend.protocol import TokenBatch
    from qwen2kit.backend.registry import get

    spec = small_spec(tied=False)
    for adapter in (None, LORA):
        plan = TrainPlan(micro_batch_rows=1, adapter=adapter, compile=False)
        model: Any = get("torch").compile(
            spec, ExecutionPlan(device="cpu", dtype="bfloat16", train=plan)
        )
        model.load(random_weights(spec))
        ids = np.arange(64, dtype=np.int32).reshape(2, 32)
        positions = np.tile(np.arange(32, dtype=np.int32), (2, 1))
        batch = TokenBatch(
            tokens=ids, labels=ids, positions=positions, documents=np.zeros_like(ids)
        )
        model.train_step(batch, 1e-3)
        (memory,) = predict(workload(spec, adapter=adapter, seq_len=32, batch_rows=2))
        parameters = list(model.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = [
            value
            for values in model._optimizer.state.values()
            for key, value in values.items()
            if key != "step"
        ]
        assert memory.weights == size(parameters)
        assert memory.gradients == size(gradients)
        assert memory.optimizer == size(moments)
        assert all(isinstance(tensor, torch.Tensor) for tensor in moments)


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_parts_add_up() -> None:
    for memory in predict(workload("qwen2-7b", Degrees(pp=4, dp_shard=2, tp=4))):
        assert sum(memory.parts.values()) == memory.allocated
        assert set(memory.parts) == set(PARTS)
        assert all(value >= 0 for value in memory.parts.values())
        assert memory.on_device(32) > memory.on_device(1) > memory.allocated


@given(
    rows=st.sampled_from([1, 2, 4]),
    length=st.sampled_from([1024, 2048, 4096]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    dp=st.sampled_from([1, 2, 8]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
)
def test_monotonicity(rows: int, length: int, recompute: str, dp: int, tp: int, pp: int) -> None:
    def step(**changes: Any) -> Workload:
        values = {
            "rows": rows, "length": length, "recompute": recompute, "dp": dp, "tp": tp, "pp": pp,
        } | changes  # fmt: skip
        return workload(
            "qwen2-7b",
            Degrees(dp_shard=values["dp"], tp=values["tp"], pp=values["pp"]),
            seq_len=values["length"],
            batch_rows=128,
            micro_batch_rows=values["rows"],
            recompute=values["recompute"],
        )

    here = fullest(step())
    assert fullest(step(rows=2 * rows)) >= here
    assert fullest(step(length=2 * length)) >= here
    assert fullest(step(recompute="full")) <= here
    assert state(predict(step(dp=2 * dp))[0]) < state(predict(step())[0])
    if tp < 4:
        assert state(predict(step(tp=2 * tp))[0]) < state(predict(step())[0])


def test_recomputation_saves_activations() -> None:
    none, selective, full = (
        max(m.activations + m.other for m in predict(workload(recompute=mode, micro_batch_rows=8)))
        for mode in ("none", "selective", "full")
    )
    assert none > selective > full


def test_1f1b_holds_fewer_micro_batches_at_later_stages() -> None:
    step = workload("qwen2-7b", Degrees(pp=4), batch_rows=32)
    assert [in_flight(step, stage) for stage in step.stages] == [4, 3, 2, 1]
    gpipe = replace(step, plan=replace(step.plan, parallel=Degrees(pp=4, schedule="gpipe")))
    assert [in_flight(gpipe, stage) for stage in gpipe.stages] == [32] * 4
    few = replace(step, batch_rows=2)
    assert [in_flight(few, stage) for stage in few.stages] == [2, 2, 2, 1]
    assert fullest(gpipe) > fullest(step)
    alone = replace(step, plan=replace(step.plan, parallel=Degrees(schedule="gpipe")))
    assert in_flight(alone, alone.stages[0]) == 1, "without a pipeline there is no schedule"


@pytest.mark.parametrize("pp", [1, 2, 4, 7, 28])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_stage_needs_more_than_the_ends(pp: int, recompute: str) -> None:
    step = workload("qwen2-7b", Degrees(pp=pp, dp_shard=2), recompute=recompute)
    ends = max(stage_memory(step, stage).allocated for stage in step.ends)
    assert ends == fullest(step)


def test_replicas_do_not_divide_the_state() -> None:
    shard = predict(workload("qwen2-7b", Degrees(dp_shard=4)))[0]
    hybrid = predict(workload("qwen2-7b", Degrees(dp_shard=4, dp_replicate=2)))[0]
    assert state(shard) == state(hybrid)


def test_adapters_have_no_gradients_of_the_base() -> None:
    (memory,) = predict(workload("qwen2-7b", adapter=LORA))
    trained = 40_370_176  # rank 16 on all matrices, as PEFT counts them
    assert memory.optimizer == 8 * trained
    # bfloat16 matrices, float32 embedding and norms.
    assert memory.weights == pytest.approx(2 * 7.07e9 + 4 * 0.545e9 + 4 * trained, rel=0.01)
    (small,) = predict(workload("qwen2-7b", adapter=NF4))
    assert small.weights < memory.weights / 2


def test_logits_never_exist_at_once() -> None:
    (memory,) = predict(workload(seq_len=8192, micro_batch_rows=4, loss_chunk_tokens=512))
    whole = 2 * 4 * 8192 * 151_936
    assert memory.logits < whole / 5


# Peaks that benchmarks/plan_accuracy.py measured on one H100 80GB HBM3 with torch 2.11, in GiB:
# model, rows x tokens of a micro-batch, recomputation, rows of the step, adapter.
MEASURED = {
    ("qwen2-0.5b", 1, 2048, "none", 1, None): 9.57,
    ("qwen2-0.5b", 1, 8192, "none", 1, None): 15.49,
    ("qwen2-0.5b", 4, 4096, "selective", 4, None): 17.08,
    ("qwen2-0.5b", 8, 4096, "full", 8, None): 9.50,
    ("qwen2-0.5b", 4, 8192, "full", 8, None): 11.32,
    ("qwen2-1.5b", 2, 2048, "none", 2, None): 29.94,
    ("qwen2-1.5b", 2, 8192, "full", 2, None): 24.84,
    ("qwen2-1.5b", 4, 2048, "none", 4, LORA): 20.46,
    ("qwen2-1.5b", 4, 4096, "full", 4, LORA): 8.30,
    ("qwen2-1.5b", 4, 2048, "full", 4, NF4): 4.19,
}


@pytest.mark.parametrize(
    "case", MEASURED, ids=lambda case: f"{case[0]} {case[1]}x{case[2]} {case[3]}"
)
def test_peaks_measured_on_a_gpu(case: tuple[Any, ...]) -> None:
    model, rows, length, recompute, batch_rows, adapter = case
    step = workload(
        model,
        seq_len=length,
        batch_rows=batch_rows,
        micro_batch_rows=rows,
        recompute=recompute,
        adapter=adapter,
    )
    assert fullest(step) / GIB == pytest.approx(MEASURED[case], rel=0.03)


def test_the_peak_of_the_training_benchmark() -> None:
    """44.3 GB on the same machine, with fused rotation and SwiGLU (benchmarks/training.py)."""
    step = workload(
        "qwen2-0.5b",
        seq_len=4096,
        batch_rows=32,
        micro_batch_rows=8,
        loss_chunk_tokens=8192,
    )
    assert fullest(step) == pytest.approx(44.32e9, rel=0.01)
