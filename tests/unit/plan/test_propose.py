"""Proposals are valid, fit, come fastest first, and their absence is explained."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.plan.degrees import Degrees, check_degrees
from qwen2kit.plan.memory import predict as predict_memory
from qwen2kit.plan.propose import (
    HEADROOM,
    Prediction,
    least_memory,
    meshes,
    propose,
    reasons,
    smallest_cluster,
)
from tests.unit.plan.workloads import LORA, NF4, cluster, workload


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["qwen2-0.5b", "qwen2-7b", "qwen2-72b", "qwen2-57b-a14b"]),
    gpus=st.sampled_from([1, 2, 6, 8, 16, 24, 64, 128]),
    gpu=st.sampled_from(["h100", "a100-80g", "rtx-4090"]),
    seq_len=st.sampled_from([2048, 4096, 32_768]),
    rows=st.sampled_from([32, 96, 256]),
)
def test_every_proposal_is_valid_and_fits(
    name: str, gpus: int, gpu: str, seq_len: int, rows: int
) -> None:
    machine = cluster(gpus, gpu)
    found = propose(workload(name, seq_len=seq_len, batch_rows=rows), machine)
    costs = []
    for prediction in found:
        step = prediction.workload
        assert step.degrees.world == gpus
        assert step.degrees.tp <= machine.gpus_per_node
        check_degrees(
            step.spec,
            step.degrees,
            seq_len=seq_len,
            batch_rows=rows,
            micro_batch_rows=step.plan.micro_batch_rows,
        )
        needs = max(memory.on_device(gpus) for memory in predict_memory(step))
        assert needs == prediction.needs <= HEADROOM * machine.hardware.memory_bytes
        axes = sum(size > 1 for size in step.degrees.sizes)
        filled = needs / machine.hardware.memory_bytes
        costs.append(prediction.time.total * (1 + 0.01 * (axes + filled)))
    assert costs == sorted(costs)
    assert len({prediction.workload.degrees for prediction in found}) == len(found)


def test_nothing_that_fits_is_faster() -> None:
    """The best proposal against every choice, tried one by one."""
    step, machine = workload("qwen2-7b", seq_len=4096, batch_rows=64), cluster(8)
    (best, *_) = propose(step, machine)
    for degrees in meshes(step, machine):
        for rows in (1, 2, 4, 8, 16, 32, 64):
            if 64 // degrees.data % rows:
                continue
            for recompute in ("none", "selective", "full"):
                plan = replace(
                    step.plan, parallel=degrees, micro_batch_rows=rows, recompute=recompute
                )
                other = Prediction(workload=replace(step, plan=plan), cluster=machine)
                if other.fits:
                    assert other.time.total > 0.95 * best.time.total


def test_a_model_that_fits_one_gpu_needs_no_tensor_parallelism() -> None:
    (best, *_) = propose(workload("qwen2-0.5b", batch_rows=64), cluster(8))
    assert best.workload.degrees == Degrees(dp_shard=8)


def test_72b_needs_more_than_eight_h100() -> None:
    step = workload("qwen2-72b", seq_len=4096)
    assert propose(step, cluster(8)) == ()
    least = least_memory(step, cluster(8))
    assert least is not None
    assert not least.fits
    # 16 bytes for each of 72.7 B parameters over 8 devices are 135 GiB already.
    assert least.needs > 16 * 72.7e9 / 8
    enough = smallest_cluster(step, cluster(8))
    assert enough in (16, 32)
    assert propose(step, cluster(32))


@pytest.mark.parametrize(("gpus", "per_node"), [(3, 8), (7, 8), (4, 6)])
def test_the_cluster_that_is_enough_is_one_of_whole_nodes(gpus: int, per_node: int) -> None:
    step = workload("qwen2-72b", seq_len=4096, batch_rows=1536)
    enough = smallest_cluster(step, cluster(gpus, gpus_per_node=per_node))
    assert enough is not None
    assert enough % per_node == 0


def test_512_h100_train_72b_with_good_utilisation() -> None:
    (best, *_) = propose(workload("qwen2-72b", seq_len=4096, batch_rows=1024), cluster(512))
    assert best.workload.degrees.tp in (2, 4, 8)
    flops = 445e9 * best.workload.tokens_per_step / best.time.total / 512
    assert 0.35 < flops / 989e12 < 0.6


def test_adapters_stay_with_data_and_context_parallelism() -> None:
    step = workload("qwen2-7b", adapter=NF4, seq_len=8192)
    assert all(mesh.tp == mesh.pp == 1 for mesh in meshes(step, cluster(8)))
    (best, *_) = propose(step, cluster(1, "rtx-4090"))
    assert best.fits
    assert propose(workload("qwen2-72b", adapter=LORA), cluster(8))


def test_meshes_divide_what_the_model_allows() -> None:
    step = workload("qwen2-7b", seq_len=8192, batch_rows=64)  # 4 key/value heads
    found = list(meshes(step, cluster(64)))
    assert len(set(found)) == len(found)
    assert {mesh.tp for mesh in found} == {1, 2, 4}
    assert {mesh.cp for mesh in found} == {1, 2}
    assert all(mesh.dp_replicate == 1 or mesh.sharded * mesh.tp % 8 == 0 for mesh in found)
    assert {mesh.world for mesh in found} == {64}


def test_impossible_batches_have_no_mesh() -> None:
    step = workload("qwen2-0.5b", batch_rows=64)
    machine = cluster(31, gpus_per_node=31)  # a prime above the number of layers
    assert list(meshes(step, machine)) == []
    assert least_memory(step, machine) is None


@pytest.mark.parametrize(
    ("degrees", "word"),
    [
        (Degrees(tp=8, dp_shard=8), "450 GB/s"),
        (Degrees(dp_shard=64), "divided over 64"),
        (Degrees(dp_shard=8, dp_replicate=8), "8 replicas"),
        (Degrees(pp=8, dp_shard=8), "bubble"),
        (Degrees(cp=4, dp_shard=16), "1,024 tokens"),
    ],
)
def test_reasons_name_what_matters(degrees: Degrees, word: str) -> None:
    step = workload("qwen2-72b", degrees, seq_len=4096, batch_rows=256)
    assert word in " ".join(reasons(Prediction(workload=step, cluster=cluster(64))))
