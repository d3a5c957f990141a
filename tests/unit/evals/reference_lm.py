"""A backend made of the reference forward pass: slow, and independent of torch and mlx."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.protocol import (
    PROTOCOL_VERSION,
    Capabilities,
    Device,
    LoadReport,
    Score,
    ScoreRequest,
    TokenIds,
)
from qwen2kit.backend.slots import Feed, Slots
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.engine.recompute import RecomputingSlots
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.checkpoint import open_checkpoint


class ReferenceCompiled:
    """Scores and generates by full float64 forward passes; counts the generation steps."""

    def __init__(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        self.spec = checkpoint.spec
        self.limit = checkpoint.spec.max_position_embeddings
        self._reference = ReferenceModel(checkpoint.spec, checkpoint.weights)
        self.steps = 0
        self.closed = 0
        self.batches: list[int] = []

    def logits(self, tokens: TokenIds) -> NDArray[np.float64]:
        return self._reference.logits(tokens)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        for index in reversed(range(len(requests))):
            request = requests[index]
            inputs = (*request.context, *request.continuation)[:-1]
            assert len(inputs) <= self.spec.max_position_embeddings
            logits = self.logits(inputs)[len(request.context) - 1 :]
            peak = logits.max(axis=-1, keepdims=True)
            logp = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
            ids = np.asarray(request.continuation)
            total = float(logp[np.arange(len(ids)), ids].sum())
            yield index, Score(total, bool((logits.argmax(axis=-1) == ids).all()))

    def slots(self, count: int, capacity: int) -> Slots:
        self.batches.append(count)
        return CountedSlots(self, count, capacity)  # type: ignore[arg-type]


class CountedSlots(RecomputingSlots):
    """Tells its model what it does."""

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        self._model.steps += len(feeds)  # type: ignore[attr-defined]
        return super().feed(feeds)

    def close(self) -> None:
        self._model.closed += 1  # type: ignore[attr-defined]
        super().close()


class ReferenceBackend:
    """Just enough of a backend for provenance."""

    name = "reference"
    protocol_version = PROTOCOL_VERSION

    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32",))

    def devices(self) -> tuple[Device, ...]:
        return (Device(name="cpu", kind="NumPy"),)

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}


def load_reference(path: Path) -> LoadedModel:
    """The model directory ``path`` on the reference backend."""
    checkpoint = open_checkpoint(path)
    return LoadedModel(
        checkpoint=checkpoint,
        tokenizer=checkpoint.tokenizer(),
        backend=ReferenceBackend(),  # type: ignore[arg-type]
        model=ReferenceCompiled(path),  # type: ignore[arg-type]
        report=LoadReport(tensors=0, bytes=0, seconds=0.0),
    )
