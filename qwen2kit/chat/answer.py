"""What one turn of a conversation produced, and the calls of tools in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from qwen2kit.generate.tool_calls import ToolCall

if TYPE_CHECKING:
    from qwen2kit.chat.engine import Counts
    from qwen2kit.chat.tool_functions import Tool
    from qwen2kit.engine.text import TextEvent

FinishReason = Literal["stop", "length", "interrupted"]
DECLINED = "error: the user does not allow this call"
_INTERRUPTED = "error: the user stopped this call before it ended"


@dataclass(slots=True)
class PendingCall:
    """A call that the model asks for; it is declined unless `run` is called.

    Attributes:
        call: name and arguments.
        tool: what would be run.
        result: what the model will be told.
    """

    call: ToolCall
    tool: Tool
    result: str = DECLINED

    def run(self) -> None:
        """Call the function."""
        self.result = _INTERRUPTED
        self.result = self.tool.run(self.call.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one `ChatSession.send` produced.

    Attributes:
        text: everything said, calls left out.
        calls: calls of tools, with what they gave.
        prompt_tokens: tokens of the (last) prompt.
        cached_tokens: those of all prompts that had been read before and were not computed again.
        tokens: tokens generated, stop tokens included.
        drafted, accepted: tokens guessed ahead, and those of them that were right.
        finish_reason: ``stop`` (the model ended its turn), ``length`` (the token limit or the
            context was reached) or ``interrupted`` (the caller closed the stream).
        context_tokens: tokens of the conversation with this answer.
        context_limit: tokens the model's context holds.
        seconds: of generating, up to the last token; calls of tools are not counted.
        first_token_seconds: from `send` to the first token.
    """

    text: str
    calls: tuple[tuple[ToolCall, str], ...]
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    drafted: int
    accepted: int
    finish_reason: FinishReason
    context_tokens: int
    context_limit: int
    seconds: float
    first_token_seconds: float

    @property
    def context_full(self) -> bool:
        """Whether ``length`` means that the model's context is used up."""
        return self.finish_reason == "length" and self.context_tokens >= self.context_limit

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token (which includes reading the prompt) left out."""
        elapsed = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / elapsed if self.tokens > 1 and elapsed > 0 else 0.0


@dataclass(slots=True)
class Progress:
    """An answer in the making; `begin` and `end` enclose each stretch of generating."""

    context_limit: int
    pieces: list[str] = field(default_factory=list)
    calls: list[PendingCall] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    finish_reason: FinishReason = "interrupted"
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    _round_tokens: int = 0
    _started: float = 0.0
    _before: float = 0.0

    def begin(self, started: float, prompt_tokens: int) -> None:
        """A prompt is about to be read."""
        self._started, self._before = started, self.seconds
        self.prompt_tokens, self._round_tokens = prompt_tokens, 0
        self.finish_reason = "interrupted"

    def add(self, event: TextEvent) -> None:
        """Tokens came out."""
        self.seconds = self._before + perf_counter() - self._started
        self.first_token_seconds = self.first_token_seconds or self.seconds
        self.tokens += len(event.tokens)
        self._round_tokens += len(event.tokens)
        assert event.finish_reason != "error", "the stream has raised"
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason

    def count(self, before: Counts, after: Counts) -> None:
        """What the engine counted before and after the stretch that ends here."""
        self.cached_tokens += after.cached - before.cached
        self.drafted += after.drafted - before.drafted
        self.accepted += after.accepted - before.accepted

    def answer(self) -> Answer:
        """What there is so far."""
        return Answer(
            text="".join(self.pieces),
            calls=tuple((pending.call, pending.result) for pending in self.calls),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            tokens=self.tokens,
            drafted=self.drafted,
            accepted=self.accepted,
            finish_reason=self.finish_reason,
            context_tokens=self.prompt_tokens + self._round_tokens,
            context_limit=self.context_limit,
            seconds=self.seconds,
            first_token_seconds=self.first_token_seconds,
        )
