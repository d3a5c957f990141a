"""Between the endpoints and the engine thread: admission, tickets, cancellation, failure.

Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import ceil
from time import perf_counter

from qwen2kit.engine.text import TextEngine, TextEvent
from qwen2kit.serve.engine_thread import EngineThread
from qwen2kit.serve.errors import (
    ApiError,
    engine_failed,
    invalid,
    non_finite,
    overloaded,
    shutting_down,
)
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.metrics import EngineState, Metrics
from qwen2kit.serve.own_thread import OwnThread
from qwen2kit.serve.score_memory import PromptScores
from qwen2kit.serve.scoring import Scoring
from qwen2kit.serve.ticket import Job, Ticket, Work

_LONGEST_WAIT = 60
_LAST_STEP = 15.0
_SMOOTHING = 0.1


def _ignore(error: BaseException) -> None:
    """Nobody else wants to know."""


class Dispatcher:
    """Hands work to an engine thread and its events to whoever waits for them.

    Args:
        home: the thread in which the engine was made.
        engine: given over to it.
        limits: of the server.
        metrics: told what happens.
        on_failure: called when the engine breaks, after everybody who waited was told.

    Attributes:
        failure: what broke the engine, or None.
        draining: new work is refused because the server is about to leave.
    """

    def __init__(
        self,
        home: OwnThread,
        engine: TextEngine,
        limits: Limits,
        metrics: Metrics,
        on_failure: Callable[[BaseException], None] = _ignore,
    ) -> None:
        self.failure: BaseException | None = None
        self.draining = False
        self._limits = limits
        self._metrics = metrics
        self._on_failure = on_failure
        self._open: set[Ticket] = set()
        self._by_key: dict[int, Ticket] = {}
        self._scorings: set[Scoring] = set()
        self._mean_seconds = 1.0
        self._thread = EngineThread(home, engine, asyncio.get_running_loop(), self)

    async def close(self) -> None:
        """Tell everybody who still waits, and let the engine go after its current step.

        A step that does not end becomes the `failure`.
        """
        self.abort(shutting_down())
        self._thread.leave()
        if not await asyncio.to_thread(self._thread.join, _LAST_STEP):
            self.failure = self.failure or TimeoutError("a step of the model does not end")

    @property
    def stalled(self) -> bool:
        """Whether a step takes longer than any step should."""
        began = self._thread.step_began
        return began is not None and perf_counter() - began > self._limits.stall

    @property
    def load(self) -> int:
        """Sequences that are being computed or wait."""
        return len(self._open) + len(self._scorings)

    def check_room(self, sequences: int) -> None:
        """Raise ApiError unless that many more sequences are taken now."""
        if self.failure is not None:
            raise engine_failed()
        if self.draining:
            raise shutting_down()
        room = self._limits.slots + self._limits.queue
        if sequences > room:
            raise invalid(f"{sequences} choices at once are more than the {room} this server takes")
        if self.load + sequences > room:
            seconds = ceil(self._mean_seconds * self.load / self._limits.slots)
            raise overloaded(min(_LONGEST_WAIT, max(1, seconds)))

    async def submit(self, works: Sequence[Work], *, admitted: bool = False) -> Job:
        """Queue sequences, all or none; those of a request that was ``admitted`` before find room.
        Raises ApiError if the server or the engine refuses."""
        if not admitted:
            self.check_room(len(works))
        elif self.failure is not None:
            raise engine_failed()
        job = Job(works, self._limits.max_pending)
        self._open.update(job.tickets)
        for ticket in job.tickets:
            self._thread.submit(ticket)
        try:
            await job.accepted
        except BaseException:
            self.cancel(job)
            raise
        return job

    def cancel(self, job: Job) -> None:
        """Nobody wants this any more; finished sequences are left alone."""
        for ticket in job.tickets:
            if ticket in self._open:
                self._forget(ticket)
                self._thread.cancel(ticket)

    async def score(self, prompts: Sequence[tuple[int, ...]], top: int) -> list[PromptScores]:
        """Log-probabilities of the prompts' tokens. Raises ApiError as `submit`."""
        self.check_room(len(prompts))
        new = asyncio.get_running_loop().create_future
        scorings = [Scoring(prompt, top, new()) for prompt in prompts]
        self._scorings.update(scorings)
        for scoring in scorings:
            self._thread.score(scoring)
        try:
            return list(await asyncio.gather(*(scoring.answer for scoring in scorings)))
        finally:
            for scoring in scorings:
                scoring.cancelled = True
            self._scorings.difference_update(scorings)

    def abort(self, error: ApiError) -> None:
        """End everything that runs or waits with ``error``."""
        for job in {ticket.job for ticket in self._open}:
            job.fail(error)
            self.cancel(job)
        for scoring in list(self._scorings):
            self.scored(scoring, error)

    def accepted(self, ticket: Ticket, key: int) -> None:
        if ticket in self._open:
            self._by_key[key] = ticket
            ticket.job.accept()

    def refused(self, ticket: Ticket, error: ApiError) -> None:
        ticket.job.fail(error)
        self._forget(ticket)

    def stepped(self, events: Sequence[TextEvent], state: EngineState) -> None:
        self._metrics.report(state)
        now = perf_counter()
        for event in events:
            ticket = self._by_key.get(event.key)
            if ticket is not None:
                self._pass_on(event, ticket, now)

    def scored(self, scoring: Scoring, result: PromptScores | ApiError) -> None:
        if scoring.answer.done():
            return
        if isinstance(result, ApiError):
            scoring.answer.set_exception(result)
        else:
            scoring.answer.set_result(result)

    def failed(self, error: BaseException) -> None:
        self.failure = error
        self.abort(engine_failed())
        self._on_failure(error)

    def _pass_on(self, event: TextEvent, ticket: Ticket, now: float) -> None:
        if event.tokens:
            seconds, ticket.last_token = now - ticket.last_token, now
            self._metrics.tokens(len(event.tokens), seconds, first=ticket.tokens == 0)
            ticket.tokens += len(event.tokens)
        if event.finish_reason == "error":
            ticket.job.fail(non_finite())
            self.cancel(ticket.job)
        elif not ticket.job.push(ticket, event):
            self.cancel(ticket.job)
        elif event.finish_reason is not None:
            self._mean_seconds += _SMOOTHING * (now - ticket.created - self._mean_seconds)
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._open.discard(ticket)
        if ticket.key is not None:
            self._by_key.pop(ticket.key, None)
