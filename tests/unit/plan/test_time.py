"""Predicted time: published throughput of other trainers, formulas, and what must hold anyway."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2kit.plan import time
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.time import PARTS, StepTime, flops_per_token, mfu, predict, tokens_per_second
from qwen2kit.plan.workload import Workload
from qwen2kit.spec.counts import count_params, train_flops_per_token
from qwen2kit.spec.model import ModelSpec
from tests.unit.plan.workloads import LORA, NF4, cluster, workload


def llama(layers: int, hidden: int, heads: int, ffn: int) -> ModelSpec:
    """Llama 3.1's shapes; its missing biases are of no account."""
    return ModelSpec(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    )


LLAMA_8B = llama(32, 4096, 32, 14_336)
LLAMA_70B = llama(80, 8192, 64, 28_672)
LLAMA_405B = llama(126, 16_384, 128, 53_248)


def per_gpu(step: Workload, gpu: str) -> float:
    seconds = predict(step, cluster(step.degrees.world, gpu)).total
    return tokens_per_second(step, seconds) / step.degrees.world


# Tokens per second and GPU that torchtitan's repository publishes: docs/performance.md of 2024-09
# for A100, benchmarks/llama3-8b_h200_202506 and benchmarks/llama3_h100_202412.
PUBLISHED = {
    "8B, 64 A100": (LLAMA_8B, "a100-80g", Degrees(dp_shard=64), 64, 1, "selective", False, 2973),
    "70B, 64 A100": (LLAMA_70B, "a100-80g", Degrees(dp_shard=64), 64, 1, "full", False, 331),
    "8B, 32 H200": (LLAMA_8B, "h200", Degrees(dp_shard=32), 64, 2, "selective", True, 10_938),
}
THROTTLED = {
    "8B, 8 GPUs": (LLAMA_8B, "h100", Degrees(dp_shard=8), 16, 2, "selective", False, 6667),
    "8B, float8": (LLAMA_8B, "h100", Degrees(dp_shard=8), 16, 2, "selective", True, 8532),
    "8B, 128 GPUs": (LLAMA_8B, "h100", Degrees(dp_shard=128), 256, 2, "selective", False, 6514),
    "70B": (LLAMA_70B, "h100", Degrees(dp_shard=32, tp=8), 512, 16, "full", True, 829),
    "405B": (LLAMA_405B, "h100", Degrees(dp_shard=8, tp=8, pp=8), 256, 1, "full", True, 100),
}


def ratio(
    spec: ModelSpec,
    gpu: str,
    degrees: Degrees,
    rows: int,
    micro: int,
    recompute: str,
    float8: bool,
    published: int,
) -> float:
    """Predicted over published throughput."""
    step = workload(
        spec,
        degrees,
        seq_len=8192,
        batch_rows=rows,
        micro_batch_rows=micro,
        recompute=recompute,
        float8=float8,
    )
    return per_gpu(step, gpu) / published


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_throughput(name: str) -> None:
    assert ratio(*PUBLISHED[name]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", THROTTLED)
def test_faster_than_throttled_h100(name: str) -> None:
    """Those H100 are limited to 500 of 700 W and have 2.4 of 3.35 TB/s."""
    assert 1 < ratio(*THROTTLED[name]) < 1.65


@pytest.mark.parametrize(
    ("model", "rows", "micro", "measured"),
    [("qwen2-0.5b", 32, 8, 125_033), ("qwen2-1.5b", 16, 4, 48_214)],
)
def test_measured_on_one_h100(model: str, rows: int, micro: int, measured: int) -> None:
    """Tokens per second of our own training on rows of 4,096 (the second before norms, rotation
    and SwiGLU were fused)."""
    step = workload(model, seq_len=4096, batch_rows=rows, micro_batch_rows=micro)
    assert per_gpu(step, "h100") == pytest.approx(measured, rel=0.05)


def test_flops_are_those_of_the_spec() -> None:
    step = workload("qwen2-7b", seq_len=4096)
    assert flops_per_token(step) == train_flops_per_token(step.spec, 4096)
    adapters = replace(step, plan=replace(step.plan, adapter=LORA))
    matrices = count_params(step.spec).activated_non_embedding + 152_064 * 3584
    assert flops_per_token(step) - flops_per_token(adapters) == 2 * matrices


def test_mfu_of_a_step_at_peak_is_one() -> None:
    step, machine = workload("qwen2-7b"), cluster(1)
    ideal = flops_per_token(step) * step.tokens_per_step / 989e12
    assert mfu(step, machine, ideal) == pytest.approx(1)


@given(
    name=st.sampled_from(["qwen2-0.5b", "qwen2-7b", "qwen2-72b"]),
    gpu=st.sampled_from(["h100", "a100-80g", "l40s", "b200"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2, 4]),
)
def test_mfu_is_below_what_products_reach(
    name: str, gpu: str, recompute: str, tp: int, pp: int
) -> None:
    step = workload(name, Degrees(dp_shard=2, tp=tp, pp=pp), recompute=recompute)
    machine = cluster(step.degrees.world, gpu)
    seconds = predict(step, machine)
    assert 0 < mfu(step, machine, seconds.total) < time.MATMUL_EFFICIENCY
    assert all(value >= 0 for value in seconds.parts.values())
    assert sum(seconds.parts.values()) == pytest.approx(seconds.total)
    assert set(seconds.parts) == set(PARTS)


def seconds(**changes: object) -> StepTime:
    step = workload("qwen2-7b", Degrees(dp_shard=8), micro_batch_rows=4, **changes)  # type: ignore[arg-type]
    return predict(step, cluster(8))


def test_recomputation_costs_time() -> None:
    none, selective, full = (
        seconds(recompute=mode).total for mode in ("none", "selective", "full")
    )
    assert none < selective < full
    assert full / none == pytest.approx(4 / 3, rel=0.1)  # one forward pass more


def test_a_step_is_linear_in_its_micro_batches() -> None:
    one, two = seconds(batch_rows=64), seconds(batch_rows=128)
    assert two.matmul == pytest.approx(2 * one.matmul)
    assert two.total < 2 * one.total  # one update


def test_float8_is_faster_and_float32_slower() -> None:
    assert seconds(float8=True).total < seconds().total < seconds(dtype="float32").total / 5


def test_pipeline_bubble() -> None:
    """(p - 1) / (m + p - 1) of the slots (arXiv 2104.04473), communication apart."""
    step = workload("qwen2-72b", Degrees(pp=4, tp=8), batch_rows=12)
    time = predict(step, cluster(32))
    slots = time.total - time.optimizer - 0.02 * time.communication
    assert time.bubble / slots == pytest.approx(3 / (12 + 3), rel=0.02)


def test_a_group_within_a_node_uses_links_and_others_share_the_network() -> None:
    machine = cluster(64)
    assert machine.bandwidth(8, 1) == pytest.approx(0.75 * 450e9)
    # 64 processes: eight of a node share its eight cards of 50 GB/s.
    assert machine.bandwidth(64, 1) == pytest.approx(0.75 * 400e9)
    # Every eighth process: one per node.
    assert machine.bandwidth(8, 8) == pytest.approx(0.75 * 50e9)
    assert machine.bandwidth(4, 2) == machine.bandwidth(8, 1)


def test_tensor_parallelism_across_nodes_is_a_bad_idea() -> None:
    step = workload("qwen2-72b", Degrees(tp=8))
    inside = predict(step, cluster(8)).communication
    assert predict(step, cluster(8, gpus_per_node=4)).communication > 1.5 * inside


def test_small_models_wait_for_the_host() -> None:
    step = workload("qwen2-0.5b", seq_len=256)
    assert predict(step, cluster(1)).launch > 0
    eager = replace(step, plan=replace(step.plan, compile=False))
    assert predict(eager, cluster(1)).total > 2 * predict(step, cluster(1)).total
    assert predict(workload("qwen2-7b", seq_len=8192), cluster(1)).launch == 0


def test_nf4_is_slower_than_bfloat16_adapters() -> None:
    assert (
        predict(workload("qwen2-7b", adapter=NF4), cluster(1)).total
        > predict(workload("qwen2-7b", adapter=LORA), cluster(1)).total
    )
