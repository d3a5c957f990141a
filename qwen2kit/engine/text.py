"""The engine with text at its mouth: finished characters, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qwen2kit.backend.slots import BROKEN
from qwen2kit.backend.values import FinishReason, TokenEvent
from qwen2kit.engine.drafting import Drafter
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Constraint, Request
from qwen2kit.engine.stats import EngineStats
from qwen2kit.generate.sampling import Sampling
from qwen2kit.generate.stream import TextStream

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel


class TextEvent(NamedTuple):
    """What a step added to one request.

    Attributes:
        key: the request's.
        text: what became final; empty while a character is incomplete or a stop string possible.
        tokens: drawn in this step, in order, a stop token included.
        finish_reason: set on the last event of a request; ``stop`` for a stop string too,
            ``error`` after NaN or infinite logits.
    """

    key: int
    text: str
    tokens: tuple[TokenEvent, ...]
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class _Open:
    """A request in progress."""

    stream: TextStream
    stop_ids: frozenset[int]


class TextEngine:
    """An `Engine` over a loaded model that speaks text.

    Args:
        loaded: model and tokenizer.
        slots, capacity, prefill_tokens, drafter: see `Engine`.

    Attributes:
        engine: the one inside.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        slots: int,
        capacity: int,
        prefill_tokens: int = 2048,
        drafter: Drafter | None = None,
    ) -> None:
        self.engine = Engine(
            loaded.model,
            slots=slots,
            capacity=capacity,
            prefill_tokens=prefill_tokens,
            drafter=drafter,
        )
        self._tokenizer = loaded.tokenizer
        self._open: dict[int, _Open] = {}

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.engine.busy

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return self.engine.waiting

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self.engine.running

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was made."""
        return self.engine.stats

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop: tuple[str, ...] = (),
        stream: int = 0,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a prompt; returns the key its events carry.

        Args:
            prompt_ids: token ids.
            sampling: how to choose tokens.
            stop: strings that end the request; the first one completed counts, and is not text.
            stream: see `Request`.
            constraint: see `Request`.

        Raises:
            BackendError: see `Engine.submit`.
            ConfigError: a stop string is empty.
        """
        text = TextStream(self._tokenizer, stop)
        key = self.engine.submit(Request(tuple(prompt_ids), sampling, stream, constraint))
        self._open[key] = _Open(text, frozenset(sampling.stop_token_ids))
        return key

    def cancel(self, key: int) -> None:
        """Forget a request; no event follows. Unknown and finished keys are ignored."""
        self._open.pop(key, None)
        self.engine.cancel(key)

    def step(self) -> list[TextEvent]:
        """One step of the engine; an event for every request that got tokens."""
        drawn: dict[int, list[TokenEvent]] = {}
        for event in self.engine.step():
            drawn.setdefault(event.prompt, []).append(event)
        return [self._event(key, events) for key, events in drawn.items()]

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self._open.clear()
        self.engine.close()

    def __enter__(self) -> TextEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(self, key: int, events: list[TokenEvent]) -> TextEvent:
        request = self._open[key]
        stream, pieces, used = request.stream, [], 0
        for event in events:
            if event.token == BROKEN:
                break
            used += 1
            if event.token not in request.stop_ids:
                pieces.append(stream.push(event.token))
            if stream.stopped:
                break
        reason: FinishReason | None = events[-1].finish_reason
        if stream.stopped:
            reason = "stop"
            self.engine.cancel(key)
        if reason is not None:
            pieces.append(stream.finish())
            del self._open[key]
        return TextEvent(key, "".join(pieces), tuple(events[:used]), reason)
