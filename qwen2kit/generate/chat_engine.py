"""One slot that outlives the turns of a conversation, so that a turn only reads what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from qwen2kit.engine.text import TextEngine, TextEvent

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.engine.drafting import Drafter
    from qwen2kit.engine.request import Constraint
    from qwen2kit.generate.sampling import Sampling

_FIRST_CAPACITY: Final = 4096


class Counts(NamedTuple):
    """Tokens that were in the cache already, that were guessed, and that were guessed right."""

    cached: int = 0
    drafted: int = 0
    accepted: int = 0


class ChatEngine:
    """Answers one prompt after the other.

    Room for keys and values grows with the conversation, in powers of two; when it does, the
    conversation is read again once.

    Args:
        loaded: the model.
        drafter: makes a drafter for so many slots of so many tokens.
    """

    def __init__(
        self, loaded: LoadedModel, drafter: Callable[[int, int], Drafter] | None = None
    ) -> None:
        self._loaded = loaded
        self._drafter = drafter
        self._engine: TextEngine | None = None
        self._past = Counts()

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, constraint: Constraint | None = None
    ) -> Iterator[TextEvent]:
        """The answer as it comes. Closing the stream early keeps what was read; an exception from
        inside the model (Ctrl-C too) costs it.

        Raises:
            BackendError: the prompt is longer than the model can take, or memory is short.
        """
        engine = self._open(min(self._loaded.model.limit, len(prompt) + sampling.max_new_tokens))
        key = engine.submit(prompt, sampling, constraint=constraint)
        done = False
        try:
            while not done:
                try:
                    events = engine.step()
                except BaseException:
                    self.close()
                    raise
                for event in events:
                    done = event.finish_reason is not None
                    yield event
        finally:
            if not done and self._engine is engine:
                engine.cancel(key)

    @property
    def counts(self) -> Counts:
        """Of all answers so far."""
        now = Counts() if self._engine is None else _counts(self._engine)
        return Counts(*map(sum, zip(self._past, now, strict=True)))

    def close(self) -> None:
        """Give the memory back; the next answer takes it again."""
        if self._engine is not None:
            self._past = self.counts
            self._engine.close()
            self._engine = None

    def _open(self, tokens: int) -> TextEngine:
        if self._engine is not None and self._engine.engine.capacity < tokens:
            self.close()
        if self._engine is None:
            capacity = max(_FIRST_CAPACITY, 1 << (tokens - 1).bit_length())
            capacity = min(capacity, self._loaded.model.limit)
            drafter = None if self._drafter is None else self._drafter(1, capacity)
            self._engine = TextEngine(self._loaded, slots=1, capacity=capacity, drafter=drafter)
        return self._engine


def _counts(engine: TextEngine) -> Counts:
    stats = engine.stats
    return Counts(stats.cached_tokens, stats.drafted, stats.accepted)
