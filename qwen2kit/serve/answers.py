"""From the engine's events to what a choice has said: text, tool calls, tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from qwen2kit.backend.values import TokenEvent
from qwen2kit.engine.text import TextEvent
from qwen2kit.generate.tool_calls import ToolCall, ToolCallParser
from qwen2kit.serve.constraints import RequestConstraint
from qwen2kit.serve.errors import invalid
from qwen2kit.serve.ticket import Job

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
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
    calls: Sequence[ToolCall]
    tokens: tuple[TokenEvent, ...]
    finish_reason: Finish | None


class Choice:
    """One choice in the making.

    Args:
        index: its number in the answer.
        parser: finds tool calls; None where none are possible.

    Attributes:
        index: as given.
        tokens: how many so far.
    """

    def __init__(self, index: int, parser: ToolCallParser | None = None) -> None:
        self.index = index
        self.tokens = 0
        self._parser = parser
        self._called = False

    def take(self, event: TextEvent) -> Piece:
        """Go on by an event."""
        assert event.finish_reason != "error", "the job has failed"
        reason: Finish | None = event.finish_reason
        self.tokens += len(event.tokens)
        if self._parser is None:
            return Piece(self.index, event.text, (), event.tokens, reason)
        text, calls = self._parser.push(event.text)
        if reason is not None:
            rest, last = self._parser.finish()
            text, calls = text + rest, calls + last
        self._called = self._called or bool(calls)
        if reason == "stop" and self._called:
            reason = "tool_calls"
        return Piece(self.index, text, calls, event.tokens, reason)


async def batches(job: Job, choices: Sequence[Choice]) -> AsyncIterator[list[Piece]]:
    """What the job says until it has ended, all that is there at a time together.

    Raises:
        ApiError: the job failed, or a grammar could not be followed.
    """
    constraints = [ticket.work.constraint for ticket in job.tickets]
    checked = [item for item in constraints if isinstance(item, RequestConstraint)]
    while job.unfinished:
        events = await job.take()
        for constraint in checked:
            if constraint.error is not None:
                raise invalid(str(constraint.error))
        yield [choices[index].take(event) for index, event in events]


def whole_choices(pieces: Iterable[Piece], count: int) -> list[Piece]:
    """The pieces of each of ``count`` choices as one."""
    found: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        found[piece.index].append(piece)
    return [_joined(index, parts) for index, parts in enumerate(found)]


def _joined(index: int, parts: Sequence[Piece]) -> Piece:
    return Piece(
        index,
        "".join([part.text for part in parts]),
        [call for part in parts for call in part.calls],
        tuple([token for part in parts for token in part.tokens]),
        parts[-1].finish_reason if parts else None,
    )


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's ``usage``."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answer(Protocol):
    """A request on its way: `start` it, take `whole` or `stream`, and `release` it in any case."""

    async def start(self) -> None:
        """Queue the work. Raises ApiError if the request cannot be carried out."""
        ...

    async def whole(self) -> dict[str, Any]:
        """The answer as one document. Raises ApiError if it cannot be finished."""
        ...

    def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events, one or more at a time. Raises ApiError if it cannot be
        finished."""
        ...

    def release(self) -> None:
        """Stop what still runs; idempotent."""
        ...


def new_id(prefix: str) -> str:
    """A random id such as ``chatcmpl-...``."""
    return f"{prefix}-{secrets.token_hex(12)}"
