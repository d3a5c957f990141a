"""A complete third-party backend in plain NumPy: what a stranger needs to write, and no more.

It computes in float64 with the reference forward and keeps no cache, so it is slow and exact.
Registered through an entry point by `test_conformance_third_party`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import (
    PROTOCOL_VERSION,
    Capabilities,
    CompiledModel,
    Device,
    LoadReport,
    Score,
    ScoreRequest,
    TokenIds,
)
from qwen2kit.backend.slots import Slots
from qwen2kit.engine.recompute import RecomputingSlots
from qwen2kit.errors import BackendError
from qwen2kit.generate.prefix import plan_scores
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import schema
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.source import MemorySource, WeightSource
from qwen2kit.weights.tensor import HostTensor


class NumpyModel:
    """One spec in NumPy."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.limit = spec.max_position_embeddings
        self._reference = ReferenceModel(spec, MemorySource({}))

    def load(self, weights: WeightSource) -> LoadReport:
        start = time.perf_counter()
        check_fits(self.spec, weights)
        tensors = {param.name: weights.read(param.name) for param in schema(self.spec)}
        self._reference = ReferenceModel(self.spec, MemorySource(tensors))
        size = sum(tensor.nbytes for tensor in tensors.values())
        return LoadReport(tensors=len(tensors), bytes=size, seconds=time.perf_counter() - start)

    def export(self) -> Iterator[tuple[str, HostTensor]]:
        for param in schema(self.spec):
            yield param.name, self._reference._weights.read(param.name)

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        self._check(tokens)
        return self._reference.logits(tokens).astype(np.float32)

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32]:
        self._check(tokens)
        return self._reference.hidden_states(tokens).astype(np.float32)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        kept: tuple[int, ...] = ()
        for step in plan_scores(requests):
            kept = kept[: step.keep] + step.feed
            logits = self.logits(kept)[step.keep :].astype(np.float64)
            for target in step.targets:
                rows = logits[target.first : target.first + len(target.tokens)]
                rows = rows - rows.max(axis=-1, keepdims=True)
                logprobs = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
                chosen = logprobs[np.arange(len(rows)), list(target.tokens)]
                greedy = bool((rows.argmax(axis=-1) == target.tokens).all())
                yield target.request, Score(float(chosen.sum()), greedy)

    def slots(self, count: int, capacity: int) -> Slots:
        return RecomputingSlots(self, count, capacity)

    def _check(self, tokens: TokenIds) -> None:
        if not 0 < len(tokens) <= self.limit:
            raise BackendError(f"cannot run {len(tokens)} tokens")
        if min(tokens) < 0 or max(tokens) >= self.spec.vocab_size:
            raise BackendError("a token id is outside the vocabulary")


class NumpyBackend:
    """NumPy on the CPU."""

    name = "numpy"
    protocol_version = PROTOCOL_VERSION
    model = NumpyModel

    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32",), moe=True, sliding_window=True)

    def devices(self) -> tuple[Device, ...]:
        return (Device(name="cpu", kind="NumPy"),)

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def compile(self, spec: ModelSpec, plan: ExecutionPlan) -> CompiledModel:
        if plan.device not in ("auto", "cpu"):
            raise BackendError(f"the numpy backend has no device {plan.device!r}; use cpu")
        if plan.train is not None:
            raise BackendError("the numpy backend does not train")
        return self.model(spec)
