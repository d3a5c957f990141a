"""The predicted peak of a whole step against what PyTorch's allocator reports on the CPU.

The CPU has no CUDA context, cuBLAS workspace or fused loss; the first two are left out of the
prediction and the vocabulary is too small for the third to matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan, LoRAPlan, Recompute, TrainPlan
from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.backend.registry import get
from qwen2kit.plan.memory import MASTER_BYTES, MOMENTS, WORKSPACE, predict
from tests.conftest import random_weights, small_spec
from tests.unit.plan.workloads import LORA, workload

torch = pytest.importorskip("torch")

LENGTH = 1024


def spec() -> Any:
    return small_spec(
        vocab_size=256,
        hidden_size=448,
        intermediate_size=2432,
        num_hidden_layers=4,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=LENGTH,
    )


def batch(rows: int) -> TokenBatch:
    tokens = np.random.default_rng(0).integers(0, 256, (rows, LENGTH), dtype=np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
    return TokenBatch(
        tokens=tokens, labels=tokens, positions=positions, documents=np.zeros_like(tokens)
    )


def measured_peaks(plan: TrainPlan, rows: int) -> Iterator[int]:
    """Bytes at the fullest moment of a step: the state before it, and allocations since.

    On a busy machine the profiler misses allocations now and then: of one, two and three steps.
    """
    torch._dynamo.reset()
    model: Any = get("torch").compile(
        spec(), ExecutionPlan(device="cpu", dtype="bfloat16", train=plan)
    )
    model.load(random_weights(spec()))
    for _ in range(2):
        model.train_step(batch(rows), 1e-4)
    parameters = list(model.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    before = sum(p.numel() * p.element_size() for p in parameters)
    before += MOMENTS * MASTER_BYTES * trained
    yield from accumulate((before + allocated_in_a_step(model, rows) for _ in range(3)), max)


def allocated_in_a_step(model: Any, rows: int) -> int:
    """Most bytes allocated since the step began, the last step's gradients counted as kept."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model.train_step(batch(rows), 1e-4)
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return int(np.cumsum([size for _, size in sorted(events)]).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "rows", "adapter"),
    [("none", 2, None), ("selective", 2, None), ("full", 4, None), ("full", 2, LORA)],
    ids=["none", "selective", "full, accumulated", "full, lora"],
)
def test_peak(recompute: Recompute, rows: int, adapter: LoRAPlan | None) -> None:
    plan = TrainPlan(micro_batch_rows=2, recompute=recompute, compile=True, adapter=adapter)
    step = workload(
        spec(),
        seq_len=LENGTH,
        batch_rows=rows,
        micro_batch_rows=2,
        recompute=recompute,
        adapter=adapter,
    )
    (memory,) = predict(step)
    expected = pytest.approx(memory.allocated - WORKSPACE, rel=0.05)
    peaks: list[int] = []
    for peak in measured_peaks(plan, rows):
        peaks.append(peak)
        if peak == expected:
            return
    raise AssertionError(f"{peaks} are not {expected}")
