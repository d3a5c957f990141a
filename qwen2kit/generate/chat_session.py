"""A conversation with a loaded model: history in, streamed text out. No terminal in here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from qwen2kit.errors import ConfigError
from qwen2kit.generate.stream import TextStream

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one `ChatSession.send` produced.

    Attributes:
        text: the whole answer.
        prompt_tokens: tokens the model read for it.
        tokens: tokens generated, the stop token included.
        finish_reason: ``stop`` (the model ended its turn), ``length`` (the token limit or the
            context was reached) or ``interrupted`` (the caller closed the stream).
        context_full: whether ``length`` means that the model's context is used up.
        seconds: from `send` to the last token.
        first_token_seconds: from `send` to the first token.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: Literal["stop", "length", "interrupted"]
    context_full: bool
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token (which includes reading the prompt) left out."""
        elapsed = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / elapsed if self.tokens > 1 and elapsed > 0 else 0.0


class ChatSession:
    """Turns of one conversation.

    Control tokens that somebody spells out stay ordinary text (`typed_controls` finds them). A
    model without a chat template gets each text as it stands, without the turns before it.

    Args:
        loaded: the model.
        system: system prompt; None leaves the choice to the checkpoint's template.
        sampling: overrides of the checkpoint's generation defaults (fields of `Sampling`).

    Raises:
        ConfigError: a sampling value is out of range, or ``system`` is given for a model without
            a chat template.
    """

    def __init__(
        self, loaded: LoadedModel, *, system: str | None = None, **sampling: object
    ) -> None:
        self.loaded = loaded
        self.sampling = loaded.sampling(**sampling)
        self.last: Answer | None = None
        self._turns: list[dict[str, str]] = []
        self._system: str | None = None
        if system is not None:
            self.system = system

    @property
    def is_chat(self) -> bool:
        """Whether the checkpoint has a chat template; if not, `send` completes text."""
        return self.loaded.tokenizer.chat_template is not None

    @property
    def system(self) -> str | None:
        """The system prompt; None is the template's own default. Setting it keeps the turns."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not self.is_chat:
            raise ConfigError("this model has no chat template, so it takes no system prompt")
        self._system = text

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, system prompt first when one was set (a copy)."""
        head = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*head, *(dict(turn) for turn in self._turns)]

    def typed_controls(self, text: str) -> list[str]:
        """Control tokens spelled out in ``text``; the model reads them as ordinary text."""
        tokenizer = self.loaded.tokenizer
        names = (tokenizer.decode([token]) for token in sorted(tokenizer.special_ids))
        return [name for name in names if name in text]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._turns.clear()

    def send(self, text: str) -> Iterator[str]:
        """Answer ``text`` piece by piece; afterwards `last` holds the statistics.

        The turn joins the history when the stream ends. Closing the stream early keeps what was
        said so far; closing it before any text leaves the history as it was.

        Raises:
            ConfigError: empty text, or a conversation longer than the model's context.
            TokenizerError: text that is not Unicode, or a template that fails.
                The history is unchanged in all cases.
        """
        started = perf_counter()
        prompt = self._encode(text)
        run = _Run(self.loaded, prompt, started)
        try:
            yield from run.stream(self.sampling)
        finally:
            self.last = run.answer()
            said = self.last.text or self.last.finish_reason != "interrupted"
            if said:
                self._turns.append({"role": "user", "content": text})
                self._turns.append({"role": "assistant", "content": self.last.text})

    def _encode(self, text: str) -> list[int]:
        if not text:
            raise ConfigError("the prompt is empty; say something")
        tokenizer = self.loaded.tokenizer
        if self.is_chat:
            messages = [*self.messages, {"role": "user", "content": text}]
            tokens = tokenizer.encode_chat(messages)
        else:
            tokens = tokenizer.encode(text, allow_special=False)
        limit = self.loaded.checkpoint.spec.context_length
        if len(tokens) >= limit:
            again = self.is_chat and self._turns
            remedy = "start over (/reset) or say less" if again else "shorten it"
            raise ConfigError(
                f"the conversation is {len(tokens)} tokens long, but the model's context holds "
                f"{limit}, answer included; {remedy}"
            )
        return tokens


class _Run:
    """One answer in the making."""

    def __init__(self, loaded: LoadedModel, prompt: list[int], started: float) -> None:
        self._loaded = loaded
        self._prompt = prompt
        self._started = started
        self._first = self._last = 0.0
        self._tokens = 0
        self._pieces: list[str] = []
        self._finish: Literal["stop", "length", "interrupted"] = "interrupted"

    def stream(self, sampling: Any) -> Iterator[str]:
        decoder = TextStream(self._loaded.tokenizer)
        for event in self._loaded.generate([self._prompt], sampling):
            self._last = perf_counter() - self._started
            self._first = self._first or self._last
            self._tokens += 1
            if event.finish_reason != "stop":
                yield from self._keep(decoder.push(event.token))
            if event.finish_reason is not None:
                self._finish = event.finish_reason
        yield from self._keep(decoder.finish())

    def answer(self) -> Answer:
        limit = self._loaded.checkpoint.spec.context_length
        return Answer(
            text="".join(self._pieces),
            prompt_tokens=len(self._prompt),
            tokens=self._tokens,
            finish_reason=self._finish,
            context_full=self._finish == "length" and len(self._prompt) + self._tokens >= limit,
            seconds=self._last,
            first_token_seconds=self._first,
        )

    def _keep(self, piece: str) -> Iterator[str]:
        if piece:
            self._pieces.append(piece)
            yield piece
