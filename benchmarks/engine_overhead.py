"""Python time of one engine step, over slots that cost nothing.

Prints milliseconds per step for 64 running requests: plain greedy left to the device, plain greedy
step by step, sampled from shortlists, with penalties, and with drafts of four tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from qwen2kit.backend.slots import Edit, Feed, Shortlist
from qwen2kit.engine.drafting import Unfinished
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.generate.sampling import Sampling
from qwen2kit.spec.presets import preset

SPEC = preset("qwen2-0.5b")
RUNNING = 64


class FreeLogits:
    """The same answer at once, whatever is asked."""

    def __init__(self, rows: int) -> None:
        self.count = rows
        scores = np.sort(np.random.default_rng(0).gumbel(size=(rows, 64)) * 3, axis=1)[:, ::-1]
        scores = scores.astype(np.float32)
        total = np.log(np.exp(scores.astype(np.float64)).sum(axis=1))
        ids = np.tile(np.arange(64) * 7 + 11, (rows, 1))
        self._short = Shortlist(ids, scores, total, scores, total)

    def greedy(self, limit: int | None) -> list[int]:
        return [5] * self.count

    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        return self._short

    def rows(self, rows: Sequence[int]) -> Any:
        raise AssertionError("a whole row was asked for")


class FreeSlots:
    """Slots that hold nothing."""

    def __init__(self, count: int, capacity: int) -> None:
        self.count, self.capacity = count, capacity
        self._logits: dict[int, FreeLogits] = {}

    def feed(self, feeds: Sequence[Feed]) -> FreeLogits:
        rows = sum(feed.wanted for feed in feeds)
        if rows not in self._logits:
            self._logits[rows] = FreeLogits(rows)
        return self._logits[rows]

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        while True:
            yield [5] * len(feeds)

    def copy(self, source: int, target: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass


class FourFives:
    """Guesses that are always right for plain greedy."""

    def begin(self, key: int, request: Request) -> None: ...

    def propose(self, sequences: Sequence[Unfinished]) -> list[tuple[int, ...]]:
        return [(5, 5, 5, 5)[: item.limit] for item in sequences]

    def forget(self, key: int) -> None: ...

    def close(self) -> None: ...


def step_ms(name: str, samplings: Sequence[Sampling], drafter: FourFives | None = None) -> None:
    """Print the median of 300 steps."""
    model: Any = SimpleNamespace(spec=SPEC, limit=32768, slots=FreeSlots)
    engine = Engine(model, slots=RUNNING, capacity=16384, drafter=drafter)
    for index in range(RUNNING):
        prompt = tuple((index * 31 + place) % 1000 for place in range(200))
        engine.submit(Request(prompt, samplings[index % len(samplings)], stream=index))
    while engine.waiting or any(item.unfed > 1 for item in engine._running.values()):
        engine.step()
    times = []
    for _ in range(300):
        start = time.perf_counter()
        events = engine.step()
        times.append(time.perf_counter() - start)
        assert len({event.prompt for event in events}) == RUNNING
    print(f"{name:32} {1e3 * float(np.median(times)):.3f} ms  worst {1e3 * max(times):.3f} ms")


if __name__ == "__main__":
    long = {"max_new_tokens": 16000, "stop_token_ids": (1, 2), "vocab_limit": 151646}
    greedy = Sampling(**long)  # type: ignore[arg-type]
    chat = Sampling(temperature=0.7, top_k=20, top_p=0.8, **long)  # type: ignore[arg-type]
    step_ms("plain greedy, device chooses", [greedy])
    other = Sampling(**{**long, "vocab_limit": 151640})  # type: ignore[arg-type]
    step_ms("greedy, two limits, shortlists", [greedy, other])
    step_ms("plain greedy, drafts of 4", [greedy], FourFives())
    step_ms("sampled (top-k 20, top-p 0.8)", [chat])
    penalised = Sampling(temperature=0.7, top_k=20, repetition_penalty=1.05, **long)  # type: ignore[arg-type]
    step_ms("sampled, repetition penalty", [penalised])
