"""Sequences on their way through the engine, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from qwen2kit.engine.request import Constraint
from qwen2kit.engine.text import TextEvent
from qwen2kit.generate.sampling import Sampling
from qwen2kit.serve.errors import ApiError, too_slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the engine is asked for: the arguments of `TextEngine.submit`."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stream: int = 0
    constraint: Constraint | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """One sequence of a job.

    Attributes:
        work: what was asked for.
        index: its place in the job.
        job: the job.
        key: the engine's key, set by the engine's thread when it takes the sequence.
        tokens: generated so far.
        created: when it was made (`perf_counter`).
        last_token: when its last token came; before the first one, `created`.
    """

    work: Work
    index: int
    job: Job
    key: int | None = None
    tokens: int = 0
    created: float = field(default_factory=perf_counter)
    last_token: float = field(default_factory=perf_counter)


class Job:
    """Sequences that are answered together; all methods are called in the event loop.

    Args:
        works: one or more.
        max_pending: events per sequence that may wait for the reader.

    Attributes:
        tickets: in the order of ``works``.
        unfinished: sequences whose finish reason the reader has not got.
        accepted: done when the engine has taken all of them, or refused one.
    """

    def __init__(self, works: Sequence[Work], max_pending: int) -> None:
        self.tickets = [Ticket(work, index, self) for index, work in enumerate(works)]
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unfinished = len(works)
        self._unaccepted = len(works)
        self._error: ApiError | None = None
        self._events: deque[tuple[int, TextEvent]] = deque()
        self._most = max_pending * len(works)
        self._reader: asyncio.Future[None] | None = None

    def accept(self) -> None:
        """The engine has taken one more sequence."""
        self._unaccepted -= 1
        if not self._unaccepted and not self.accepted.done():
            self.accepted.set_result(None)

    def push(self, ticket: Ticket, event: TextEvent) -> bool:
        """Hand an event to the reader; False if the reader is too far behind and was cut off."""
        if len(self._events) >= self._most:
            self.fail(too_slow())
            return False
        self._events.append((ticket.index, event))
        self._wake()
        return True

    def fail(self, error: ApiError) -> None:
        """End with an error, in place of what waits to be read."""
        if self._error is not None:
            return
        self._error = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._wake()

    async def take(self) -> list[tuple[int, TextEvent]]:
        """Index and event of every sequence that went on, in the order in which they did. What has
        piled up of one comes as one event, so that a reader who is late catches up.

        Raises:
            ApiError: the job ends otherwise.
        """
        while not self._events and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._error is not None:
            raise self._error
        found = [self._events.popleft()]
        if self._events:
            found = _piled_up([*found, *self._events])
            self._events.clear()
        for _, event in found:
            if event.finish_reason is not None:
                self.unfinished -= 1
        return found

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)


def _piled_up(events: Sequence[tuple[int, TextEvent]]) -> list[tuple[int, TextEvent]]:
    """One event per index."""
    by_index: dict[int, list[TextEvent]] = {}
    for index, event in events:
        by_index.setdefault(index, []).append(event)
    return [(index, _joined(found)) for index, found in by_index.items()]


def _joined(events: Sequence[TextEvent]) -> TextEvent:
    if len(events) == 1:
        return events[0]
    return TextEvent(
        events[0].key,
        "".join([event.text for event in events]),
        tuple([token for event in events for token in event.tokens]),
        events[-1].finish_reason,
    )
