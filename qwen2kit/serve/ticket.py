"""Sequences on their way through the engine, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
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
        accepted: done when the engine has taken all of them, or refused one.
    """

    def __init__(self, works: Sequence[Work], max_pending: int) -> None:
        self.tickets = [Ticket(work, index, self) for index, work in enumerate(works)]
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unaccepted = len(works)
        self._failed = False
        self._events: asyncio.Queue[tuple[int, TextEvent] | ApiError] = asyncio.Queue(
            max_pending * len(works)
        )

    def accept(self) -> None:
        """The engine has taken one more sequence."""
        self._unaccepted -= 1
        if not self._unaccepted and not self.accepted.done():
            self.accepted.set_result(None)

    def push(self, ticket: Ticket, event: TextEvent) -> bool:
        """Hand an event to the reader; False if the reader is too far behind and was cut off."""
        if self._events.full():
            self.fail(too_slow())
            return False
        self._events.put_nowait((ticket.index, event))
        return True

    def fail(self, error: ApiError) -> None:
        """End with an error, in place of the newest event if there is no room."""
        if self._failed:
            return
        self._failed = True
        if not self.accepted.done():
            self.accepted.set_exception(error)
            return
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(error)

    async def events(self) -> AsyncIterator[tuple[int, TextEvent]]:
        """Index and event, until every sequence has its finish reason. What has piled up of one
        sequence comes as one event, so that a reader who is late catches up.

        Raises:
            ApiError: it ends otherwise.
        """
        unfinished = len(self.tickets)
        while unfinished:
            for index, event in self._piled_up(await self._events.get()).items():
                yield index, event
                unfinished -= event.finish_reason is not None

    def _piled_up(self, item: tuple[int, TextEvent] | ApiError) -> dict[int, TextEvent]:
        """``item`` and all that waits behind it, by index."""
        found: dict[int, TextEvent] = {}
        while True:
            if isinstance(item, ApiError):
                raise item
            index, event = item
            found[index] = _joined(found[index], event) if index in found else event
            if self._events.empty():
                return found
            item = self._events.get_nowait()


def _joined(first: TextEvent, second: TextEvent) -> TextEvent:
    return TextEvent(
        first.key,
        first.text + second.text,
        first.tokens + second.tokens,
        second.finish_reason,
    )
