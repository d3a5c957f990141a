"""Batches for the training cases, and their loss by the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen2kit.backend.conformance.case import require
from qwen2kit.backend.conformance.models import PLAN, UNTIED, loaded, log_softmax, tokens
from qwen2kit.backend.plan import AdamWPlan, TrainPlan
from qwen2kit.backend.protocol import Backend, TrainableModel
from qwen2kit.backend.values import TokenBatch
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.source import MemorySource

IGNORE = -100
PLAIN = AdamWPlan(weight_decay=0.0, max_grad_norm=0.0)


def trainable(
    backend: Backend,
    spec: ModelSpec = UNTIED,
    *,
    source: MemorySource | None = None,
    **plan: object,
) -> TrainableModel:
    """``spec`` compiled for training with `weights` loaded; ``plan`` overrides `TrainPlan`."""
    train = TrainPlan(**({"optimizer": PLAIN} | plan))  # type: ignore[arg-type]
    model = loaded(backend, spec, source=source, plan=replace(PLAN, train=train))
    require(isinstance(model, TrainableModel), "compile() with a train plan gave no TrainableModel")
    assert isinstance(model, TrainableModel)
    return model


def plain_batch(seed: int = 0) -> TokenBatch:
    """Every position of every row is supervised."""
    rows, length = 4, 12
    ids = np.array([tokens(length + 1, seed=100 * seed + row) for row in range(rows)], np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return TokenBatch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, np.zeros_like(positions))


def packed_batch() -> TokenBatch:
    """Rows of two documents and padding, with a different number of supervised tokens each."""
    batch = plain_batch(seed=1)
    for row, (first, second) in enumerate(((5, 4), (7, 5), (2, 6), (11, 1))):
        end = first + second
        batch.labels[row, first - 1] = IGNORE
        batch.labels[row, end - 1 :] = IGNORE
        batch.labels[row, : row * 2] = IGNORE
        batch.positions[row, first:end] = np.arange(second)
        batch.positions[row, end:] = 0
        batch.documents[row, first:end] = 1
        batch.documents[row, end:] = -1
    return batch


def reference_loss(model: ReferenceModel, batch: TokenBatch) -> float:
    """Mean negative log-likelihood over supervised tokens, document by document, in float64."""
    losses: list[float] = []
    for ids, labels, documents in zip(batch.tokens, batch.labels, batch.documents, strict=True):
        for document in sorted(set(documents.tolist()) - {-1}):
            inside = documents == document
            rows = log_softmax(model.logits([int(token) for token in ids[inside]]))
            losses += [
                -row[label] for row, label in zip(rows, labels[inside], strict=True) if label >= 0
            ]
    return float(np.mean(losses))
