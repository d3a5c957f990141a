"""From the engine's events to what a choice has said: text, tool calls, tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.engine.text import TextEvent
from qwen2kit.generate.tool_calls import ToolCall, ToolCallParser
from qwen2kit.serve.constraints import RequestConstraint
from qwen2kit.serve.errors import invalid
from qwen2kit.serve.ticket import Job

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to a choice.

    Attributes:
        index: the choice's.
        text: to be shown.
        calls: tool calls that became complete.
        tokens: generated, stop tokens included.
        finish_reason: set on the last piece of a choice.
    """

    index: int
    text: str
    calls: list[ToolCall]
    tokens: tuple[TokenEvent, ...]
    finish_reason: Finish | None


@dataclass(slots=True)
class Choice:
    """One choice in the making, and in the end the whole of it.

    Attributes:
        index: its number in the answer.
        parser: finds tool calls; None where none are possible.
        text, calls, tokens, finish_reason: everything so far.
    """

    index: int
    parser: ToolCallParser | None = None
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    finish_reason: Finish | None = None

    def take(self, event: TextEvent) -> Piece:
        """Add an event."""
        text = event.text
        calls: list[ToolCall] = []
        assert event.finish_reason != "error", "the job has failed"
        reason: Finish | None = event.finish_reason
        if self.parser is not None:
            text, calls = self.parser.push(event.text)
            if reason is not None:
                rest, last = self.parser.finish()
                text, calls = text + rest, calls + last
        self.text += text
        self.calls += calls
        self.tokens += event.tokens
        if reason == "stop" and self.calls:
            reason = "tool_calls"
        self.finish_reason = reason
        return Piece(self.index, text, calls, event.tokens, reason)


async def pieces(job: Job, choices: Sequence[Choice]) -> AsyncIterator[Piece]:
    """What the job says, in the order in which it comes.

    Raises:
        ApiError: the job failed, or a grammar could not be followed.
    """
    async for index, event in job.events():
        constraint = job.tickets[index].work.constraint
        if isinstance(constraint, RequestConstraint) and constraint.error is not None:
            raise invalid(str(constraint.error))
        yield choices[index].take(event)


@dataclass(slots=True)
class Usage:
    """Token counts of an answer."""

    prompt_tokens: int
    completion_tokens: int = 0

    def document(self) -> dict[str, int]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Answer(Protocol):
    """A request on its way: `start` it, take `whole` or `stream`, and `release` it in any case."""

    async def start(self) -> None:
        """Queue the work. Raises ApiError if the request cannot be carried out."""
        ...

    async def whole(self) -> dict[str, Any]:
        """The answer as one document. Raises ApiError if it cannot be finished."""
        ...

    def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as chunks. Raises ApiError if it cannot be finished."""
        ...

    def release(self) -> None:
        """Stop what still runs; idempotent."""
        ...


def new_id(prefix: str) -> str:
    """A random id such as ``chatcmpl-...``."""
    return f"{prefix}-{secrets.token_hex(12)}"
