"""One slot that outlives the turns of a conversation, so that a turn only reads what is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qwen2kit.engine.text import TextEngine, TextEvent
from qwen2kit.errors import BackendError, NonFiniteLogits

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.engine.drafting import Drafter
    from qwen2kit.engine.request import Constraint
    from qwen2kit.generate.sampling import Sampling
    from qwen2kit.weights.tensor import HostTensor

_FIRST_CAPACITY: Final = 4096


class Counts(NamedTuple):
    """Tokens that were in the cache already, that were guessed, and that were guessed right."""

    cached: int = 0
    drafted: int = 0
    accepted: int = 0


class ChatEngine:
    """Answers one prompt after the other.

    Room for keys and values grows with the conversation, in powers of two; they move there if the
    backend can export them, and are computed again if not.

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
        self._held: list[int] = []

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, constraint: Constraint | None = None
    ) -> Iterator[TextEvent]:
        """The answer as it comes. Closing the stream early keeps what was read; an exception from
        inside the model (Ctrl-C too) costs it.

        Raises:
            BackendError: the prompt is longer than the model can take, or memory is short.
            NonFiniteLogits: the model produced no numbers.
        """
        engine = self._open(min(self._loaded.model.limit, len(prompt) + sampling.max_new_tokens))
        key = engine.submit(prompt, sampling, constraint=constraint)
        self._held = list(prompt)
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
                    if event.finish_reason == "error":
                        raise NonFiniteLogits
                    self._held += [drawn.token for drawn in event.tokens]
                    yield event
        finally:
            if not done and self._engine is engine:
                engine.cancel(key)

    @property
    def counts(self) -> Counts:
        """Of all answers so far."""
        now = Counts() if self._engine is None else _counts(self._engine)
        return Counts(*map(sum, zip(self._past, now, strict=True)))

    def save(self, path: Path) -> int:
        """Write what was read to a file (`qwen2kit.engine.prompt_cache`); how many tokens it is.

        Raises:
            BackendError: the backend cannot, or nothing was read yet.
            OSError: the disk is full or not writable.
        """
        from qwen2kit.engine.prompt_cache import save_prompt

        if self._engine is None:
            raise BackendError("nothing was read yet that could be saved")
        return save_prompt(path, self._engine.engine, self._held, self._fingerprint)

    def load(self, path: Path) -> int:
        """Take over what `save` wrote; how many tokens it is.

        Raises:
            WeightError: the file is none, or of another model or dtype.
            BackendError: the backend cannot, or the model does not take that many tokens.
        """
        from qwen2kit.engine.prompt_cache import load_prompt, saved_length

        engine = self._open(saved_length(path)).engine
        self._held = list(load_prompt(path, engine, self._fingerprint))
        return len(self._held)

    def close(self) -> None:
        """Give the memory back; the next answer takes it again."""
        if self._engine is not None:
            self._past = self.counts
            self._engine.close()
            self._engine = None

    @cached_property
    def _fingerprint(self) -> str:
        from qwen2kit.engine.prompt_cache import model_fingerprint

        return model_fingerprint(self._loaded.checkpoint)

    def _open(self, tokens: int) -> TextEngine:
        """An engine for so many tokens, which has what the one before it held."""
        if self._engine is not None and self._engine.engine.capacity >= tokens:
            return self._engine
        length, tensors = self._moved()
        self.close()
        capacity = max(_FIRST_CAPACITY, 1 << (tokens - 1).bit_length())
        capacity = min(capacity, self._loaded.model.limit)
        drafter = None if self._drafter is None else self._drafter(1, capacity)
        self._engine = TextEngine(self._loaded, slots=1, capacity=capacity, drafter=drafter)
        if length:
            self._engine.engine.restore(self._held[:length], iter(tensors))
        return self._engine

    def _moved(self) -> tuple[int, list[tuple[str, HostTensor]]]:
        """Length and content of the slot; nothing if there is none, or it cannot be exported."""
        if self._engine is None:
            return 0, []
        try:
            length, tensors = self._engine.engine.export(self._held)
        except BackendError:
            return 0, []
        return length, list(tensors)


def _counts(engine: TextEngine) -> Counts:
    stats = engine.stats
    return Counts(stats.cached_tokens, stats.drafted, stats.accepted)
