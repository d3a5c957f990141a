"""A model that says what a test wants it to say, through the slots every model offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count as numbers

import numpy as np

from qwen2kit.backend.slots import Feed
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.spec.model import ModelSpec


class ScriptedModel:
    """Just enough of a `CompiledModel` to generate.

    Args:
        spec: says how large the vocabulary and the context are.
        answer: the ids that follow a prompt; asked once per prompt.
    """

    def __init__(self, spec: ModelSpec, answer: Callable[[tuple[int, ...]], Sequence[int]]) -> None:
        self.spec = spec
        self.limit = spec.context_length
        self.answer = answer

    def slots(self, count: int, capacity: int) -> ScriptedSlots:
        return ScriptedSlots(self, count, capacity)


class ScriptedSlots:
    """Logits that leave no choice; running on after the script is an error."""

    def __init__(self, model: ScriptedModel, count: int, capacity: int) -> None:
        self.count, self.capacity = count, capacity
        self._model = model
        self._held: list[list[int]] = [[] for _ in range(count)]
        self._scripts: list[tuple[int, Sequence[int]]] = [(0, ())] * count

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        rows = [np.empty((0, self._model.spec.vocab_size), dtype=np.float32)]
        for feed in feeds:
            held = self._held[feed.slot]
            held[feed.start :] = feed.tokens
            start, script = self._scripts[feed.slot]
            if feed.start < start or held[start:] != list(script[: len(held) - start]):
                self._scripts[feed.slot] = (0, ())
            if feed.wanted:
                rows.append(self._next(feed.slot))
        return HostLogits(np.concatenate(rows))

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        for _ in numbers() if most is None else range(most):
            found = self.feed(feeds).greedy(limit)
            yield found
            feeds = [
                Feed(feed.slot, feed.start + 1, (token,))
                for feed, token in zip(feeds, found, strict=True)
            ]

    def copy(self, source: int, target: int, length: int) -> None:
        self._held[target] = self._held[source][:length]
        self._scripts[target] = (0, ())

    def clear(self, slot: int) -> None:
        self._held[slot] = []
        self._scripts[slot] = (0, ())

    def close(self) -> None:
        self._held = []

    def _next(self, slot: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        held = self._held[slot]
        start, script = self._scripts[slot]
        if start == 0:
            start, script = self._scripts[slot] = (len(held), self._model.answer(tuple(held)))
        assert len(held) - start < len(script), "the script has no end"
        row = np.zeros((1, self._model.spec.vocab_size), dtype=np.float32)
        row[0, script[len(held) - start]] = 1
        return row
