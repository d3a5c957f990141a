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
    TokenEvent,
    TokenIds,
)
from qwen2kit.generate.sampling import Sampler, Sampling
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.checkpoint import open_checkpoint


class ReferenceCompiled:
    """Scores and generates by full float64 forward passes; counts the generation steps."""

    def __init__(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        self.spec = checkpoint.spec
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

    def generate(self, prompts: Sequence[TokenIds], sampling: Sampling) -> Iterator[TokenEvent]:
        self.batches.append(len(prompts))
        rows = [list(prompt) for prompt in prompts]
        samplers = [Sampler(sampling, prompt, i) for i, prompt in enumerate(prompts)]
        running = set(range(len(rows)))
        try:
            for step in range(sampling.max_new_tokens):
                for row in sorted(running):
                    self.steps += 1
                    token, _ = samplers[row].draw(self.logits(rows[row])[-1].astype(np.float32))
                    rows[row].append(token)
                    stop = token in sampling.stop_token_ids
                    last = stop or step == sampling.max_new_tokens - 1
                    running -= {row} if last else set()
                    reason = "stop" if stop else "length" if last else None
                    yield TokenEvent(row, token, reason)
        finally:
            self.closed += 1


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
