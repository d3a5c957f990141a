"""Twenty training steps of a small model, and the loss of each: what all layouts must agree on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from qwen2kit.backend.plan import AdamWPlan, ExecutionPlan, TrainPlan
from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.plan.degrees import Degrees
from qwen2kit.spec.model import ModelSpec

ROWS, LENGTH, STEPS = 8, 32, 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and what it trains on."""

    degrees: Degrees = field(default_factory=Degrees)
    tied: bool = False
    packed: bool = False
    window: int | None = None
    layers: int = 4
    plan: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS


def spec_of(case: Case) -> ModelSpec:
    """Four heads, an even vocabulary."""
    from qwen2kit.spec.model import SlidingWindowSpec
    from tests.conftest import small_spec

    window = SlidingWindowSpec(
        enabled=case.window is not None, sliding_window=case.window, max_window_layers=2
    )
    return small_spec(tied=case.tied, vocab_size=200, num_hidden_layers=case.layers, window=window)


def batch_of(case: Case, step: int) -> TokenBatch:
    """The whole batch of ``step``; packed rows hold three documents and padding."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 200, (ROWS, LENGTH)).astype(np.int32)
    labels = np.roll(tokens, -1, 1)
    labels[rng.random(labels.shape) < 0.3] = -100
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    documents = np.zeros_like(tokens)
    if case.packed:
        for row in range(ROWS):
            a, b, end = np.sort(rng.choice(np.arange(1, LENGTH), 3, replace=False))
            for number, (start, stop) in enumerate(((0, a), (a, b), (b, end))):
                documents[row, start:stop] = number
                positions[row, start:stop] = np.arange(stop - start)
            documents[row, end:] = -1
            labels[row, end:] = -100
    return TokenBatch(tokens, labels, positions, documents)


def share(batch: TokenBatch, rank: int, world: int) -> TokenBatch:
    """The rows of one data-parallel process."""
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return TokenBatch(
        batch.tokens[rows], batch.labels[rows], batch.positions[rows], batch.documents[rows]
    )


def model_of(case: Case, device: str = "cpu", dtype: str = "float32") -> Any:
    """A trainable model of the case, freshly compiled."""
    from qwen2kit_torch.backend import TorchBackend

    train = {"micro_batch_rows": 2, "loss_chunk_tokens": 16, "optimizer": AdamWPlan()}
    plan = TrainPlan(**(train | case.plan), parallel=case.degrees)
    execution = ExecutionPlan(device=device, dtype=dtype, train=plan)
    return TorchBackend().compile(spec_of(case), execution)


def fresh(case: Case, seed: int) -> dict[str, Any]:
    """Weights that ``init`` makes, drawn in blocks that divide rows unevenly."""
    from qwen2kit_torch.train import init

    model = model_of(case)
    with mock.patch.object(init, "BLOCK", 300):
        model.init(seed)
    return {name: tensor.float32().copy() for name, tensor in model.export()}


def train(case: Case, save: Path | None = None, start: Path | None = None, first: int = 0) -> Any:
    """Losses, gradient norms and held-out losses of steps ``first`` to ``first + steps``.

    Args:
        save: where to write the state after the last step.
        start: what to restore before the first.
    """
    return _run(model_of(case), case, save, start, first)


def train_on(case: Case, device: str, dtype: str, **plan: Any) -> Any:
    """`train` on one process of another device, with changes to the plan."""
    case = replace(case, plan=case.plan | plan)
    return _run(model_of(case, device, dtype), case, None, None, 0)


def _run(model: Any, case: Case, save: Path | None, start: Path | None, first: int) -> Any:
    from tests.conftest import random_weights

    if start is None:
        model.load(random_weights(spec_of(case)))
    else:
        model.restore_state(start)
    curve = []
    for step in range(first, first + case.steps):
        batch = share(batch_of(case, step), *model.data_shard)
        metrics = model.train_step(batch, 2e-3)
        curve.append((metrics.loss, metrics.grad_norm))
    held_out = model.loss(share(batch_of(case, 999), *model.data_shard)).loss
    if save is not None:
        model.save_state(save).wait()
    weights = {name: tensor.float32().copy() for name, tensor in model.export()}
    return curve, held_out, weights
