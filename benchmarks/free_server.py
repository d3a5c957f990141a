"""``qwen2kit serve`` over a model that costs nothing: what the server itself can stream.

    python benchmarks/free_server.py MODEL [--step-ms 2] [--seed 0] [-- OPTIONS OF SERVE]

Configuration and tokenizer are MODEL's; in place of its weights every token is drawn at random from
the whole vocabulary, the hard case for text, since most characters arrive in pieces. What is read
of a pass is there ``--step-ms`` after it began, as with a device that computes beside the host.
`benchmarks/serving.py --free` starts it and reports the server's processor time per token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen2kit.adapters.merge import open_model
from qwen2kit.backend import loading
from qwen2kit.backend.protocol import Backend, CompiledModel, LoadReport
from qwen2kit.backend.slots import Cut, Edit, Feed, Shortlist
from qwen2kit.spec.model import ModelSpec

DISTINCT = 1 << 16
WIDTH = 64
AHEAD = 2
"""Steps that greedy decoding may be ahead of its reader."""


class FreeModel:
    """As much of a `CompiledModel` as an engine needs.

    Args:
        spec: the model's.
        step: seconds a step takes.
        seed: of the tokens.
    """

    def __init__(self, spec: ModelSpec, step: float, seed: int) -> None:
        self.spec, self.limit, self.step = spec, spec.context_length, step
        random = np.random.default_rng(seed)
        self.ids = random.integers(0, 151_643, (DISTINCT, WIDTH))
        scores = np.sort(random.gumbel(size=(DISTINCT, WIDTH)) * 3, axis=1)[:, ::-1]
        self.scores = np.ascontiguousarray(scores, dtype=np.float32)
        self.total = np.log(np.exp(self.scores.astype(np.float64)).sum(axis=1))
        self.best = self.ids[:, 0].tolist()

    def slots(self, count: int, capacity: int) -> FreeSlots:
        return FreeSlots(self, count, capacity)


class FreeSlots:
    """`Slots` that hold nothing."""

    def __init__(self, model: FreeModel, count: int, capacity: int) -> None:
        self.count, self.capacity = count, capacity
        self.model = model
        self._place = 0

    def feed(self, feeds: Sequence[Feed]) -> FreeLogits:
        ready = time.perf_counter() + self.model.step
        return FreeLogits(self.model, self._next(sum(feed.wanted for feed in feeds)), ready)

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        rows, step = len(feeds), self.model.step
        ready = time.perf_counter()
        room = self.capacity - max(feed.start for feed in feeds)
        for _ in range(room if most is None else min(room, most)):
            ready = max(ready, time.perf_counter() - AHEAD * step) + step
            _sleep_until(ready)
            yield self.model.best[self._next(rows)]

    def copy(self, source: int, target: int, length: int) -> None: ...

    def clear(self, slot: int) -> None: ...

    def close(self) -> None: ...

    def _next(self, rows: int) -> slice:
        """The places of the next answers."""
        if self._place + rows > DISTINCT:
            self._place = 0
        self._place += rows
        return slice(self._place - rows, self._place)


class FreeLogits:
    """Answers that are known before they are asked for, and given at a time (`perf_counter`)."""

    quick = True

    def __init__(self, model: FreeModel, rows: slice, ready: float) -> None:
        self._model, self._rows, self._ready = model, rows, ready

    def greedy(self, limit: int | None) -> list[int]:
        _sleep_until(self._ready)
        return self._model.best[self._rows]

    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        _sleep_until(self._ready)
        model, rows = self._model, self._rows
        scores, total = model.scores[rows], model.total[rows]
        return Shortlist(model.ids[rows], scores, total, scores, total)

    def rows(self, rows: Sequence[int]) -> Any:
        raise AssertionError("no whole row should be asked for")

    def draw(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> list[int]:
        best = self.greedy(None)
        return [best[row] for row in rows]


def _sleep_until(end: float) -> None:
    rest = end - time.perf_counter()
    if rest > 0:
        time.sleep(rest)


def free_loader(step: float, seed: int) -> Any:
    """In place of `qwen2kit.backend.loading.load_model`."""

    def load(model: str, **_: object) -> loading.LoadedModel:
        checkpoint = open_model(model, None)
        free = FreeModel(checkpoint.spec, step, seed)
        return loading.LoadedModel(
            checkpoint=checkpoint,
            tokenizer=checkpoint.tokenizer(),
            backend=cast(Backend, None),
            model=cast(CompiledModel, free),
            report=LoadReport(tensors=0, bytes=0, seconds=0.0),
        )

    return load


def main() -> None:
    from qwen2kit.cli.app import main as qwen2kit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--step-ms", type=float, default=0.0, help="how long a step takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", help="write the event loop's cProfile statistics there")
    options, serve_options = parser.parse_known_args()
    serve_options = [option for option in serve_options if option != "--"]
    loading.load_model = free_loader(options.step_ms / 1e3, options.seed)
    sys.argv = ["qwen2kit", "serve", options.model, *serve_options]
    if options.profile is None:
        qwen2kit()
        return
    import cProfile

    profile = cProfile.Profile()
    try:
        profile.runcall(qwen2kit)
    finally:
        profile.dump_stats(options.profile)


if __name__ == "__main__":
    main()
