"""Continuous batching over a model's slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from types import TracebackType

from qwen2kit.backend.limits import check_tokens
from qwen2kit.backend.protocol import CompiledModel, TokenEvent
from qwen2kit.backend.slots import Feed, Logits
from qwen2kit.engine.drafting import Drafter
from qwen2kit.engine.request import Request
from qwen2kit.engine.sequence import Sequence, start


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made.

    Attributes:
        prompt_tokens: of admitted requests.
        cached_tokens: those of them that were found in a slot and not computed again.
        generated_tokens: drawn and handed out.
        drafted: tokens proposed by the drafter.
        accepted: those of them that were drawn.
        steps: passes over the running batch.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


class Engine:
    """Continues requests together, each as if it were alone. Not thread-safe.

    Args:
        model: loaded.
        slots: most requests running at a time; the model may offer fewer.
        capacity: longest sequence in tokens, prompt included.
        prefill_tokens: most prompt tokens read in one step, so that running requests go on.
        drafter: guesses tokens ahead; the engine closes it.

    Raises:
        BackendError: not even one slot of ``capacity`` tokens is possible.
    """

    def __init__(
        self,
        model: CompiledModel,
        *,
        slots: int,
        capacity: int,
        prefill_tokens: int = 2048,
        drafter: Drafter | None = None,
    ) -> None:
        self.stats = EngineStats()
        self.capacity = capacity
        self._model = model
        self._prefill = prefill_tokens
        self._drafter = drafter
        self._slots = model.slots(slots, capacity)
        self._free = list(range(self._slots.count))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._last_key = -1

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its key, which the events carry as ``prompt``.

        Raises:
            BackendError: the prompt is empty, longer than a slot, or holds foreign token ids.
        """
        check_tokens(request.prompt, self._model.spec, self.capacity, "the prompt")
        self._last_key += 1
        self._waiting.append(start(self._last_key, request, self.capacity))
        return self._last_key

    def cancel(self, key: int) -> None:
        """Forget a request; no event follows. Unknown and finished keys are ignored."""
        self._waiting = deque(item for item in self._waiting if item.key != key)
        if key in self._running:
            self._release(self._running[key])

    def step(self) -> list[TokenEvent]:
        """Admit what fits, read some prompt, draw a token for every request that is ready."""
        self._admit()
        self.stats.steps += 1
        feeds, ready = self._feeds()
        if not feeds:
            return []
        logits = self._slots.feed(feeds)
        return [] if not ready else self._advance(ready, _draw(logits, ready))

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self._waiting.clear()
        self._running.clear()
        self._slots.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._running[sequence.key] = sequence
            self.stats.prompt_tokens += len(sequence.tokens)

    def _feeds(self) -> tuple[list[Feed], list[Sequence]]:
        feeds, ready, budget = [], [], self._prefill
        for sequence in self._running.values():
            count = sequence.unfed
            if count > 1:
                count = min(count, budget)
                budget -= count
            if not count:
                continue
            done = sequence.fed + count == len(sequence.tokens)
            tokens = tuple(sequence.tokens[sequence.fed : sequence.fed + count])
            feeds.append(Feed(sequence.slot, sequence.fed, tokens, int(done)))
            sequence.fed += count
            if done:
                ready.append(sequence)
        return feeds, ready

    def _advance(
        self, ready: Tokens[Sequence], drawn: Tokens[tuple[int, float | None]]
    ) -> list[TokenEvent]:
        events = []
        for sequence, (token, logprob) in zip(ready, drawn, strict=True):
            sequence.tokens.append(token)
            sequence.left -= 1
            reason = sequence.request.sampling.finish_reason(token, sequence.left)
            events.append(TokenEvent(sequence.key, token, reason, logprob))
            if reason is not None:
                self._release(sequence)
        self.stats.generated_tokens += len(events)
        return events

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._free.append(sequence.slot)


def _draw(logits: Logits, ready: Tokens[Sequence]) -> list[tuple[int, float | None]]:
    limits = {sequence.request.sampling.vocab_limit for sequence in ready}
    if len(limits) == 1 and all(item.request.sampling.is_plain_greedy for item in ready):
        return [(token, None) for token in logits.greedy(limits.pop())]
    rows = logits.rows(range(len(ready)))
    return [item.sampler.draw(row) for item, row in zip(ready, rows, strict=True)]
