"""The thread that owns the engine. It takes commands between steps and never waits for a client.

Other threads only put commands into its queue; what happens is reported by calls in the event
loop, all events of a step in one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import Protocol

from qwen2kit.engine.text import TextEngine, TextEvent
from qwen2kit.errors import Qwen2KitError
from qwen2kit.serve.errors import ApiError, invalid
from qwen2kit.serve.metrics import EngineState
from qwen2kit.serve.own_thread import OwnThread
from qwen2kit.serve.score_memory import PromptScores
from qwen2kit.serve.scoring import PromptScorer, Scoring
from qwen2kit.serve.ticket import Ticket


class Listener(Protocol):
    """Who is told, in the event loop."""

    def accepted(self, ticket: Ticket, key: int) -> None:
        """The engine has queued the sequence and calls it ``key``."""
        ...

    def refused(self, ticket: Ticket, error: ApiError) -> None:
        """The engine can never run the sequence."""
        ...

    def stepped(self, events: Sequence[TextEvent], state: EngineState) -> None:
        """A step was made."""
        ...

    def scored(self, scoring: Scoring, result: PromptScores | ApiError) -> None:
        """A prompt was scored, or refused."""
        ...

    def failed(self, error: BaseException) -> None:
        """The engine broke; the thread has ended."""
        ...


class EngineThread:
    """Runs an engine until it is told to leave or the engine breaks, then closes it.

    Args:
        home: the thread in which the engine was made.
        engine: nobody else touches it from now on.
        loop: where ``listener`` lives.
        listener: told what happens.

    Attributes:
        step_began: when the step that is being computed began (`perf_counter`); None between steps.
    """

    def __init__(
        self,
        home: OwnThread,
        engine: TextEngine,
        loop: asyncio.AbstractEventLoop,
        listener: Listener,
    ) -> None:
        self.step_began: float | None = None
        self._engine = engine
        self._scorer = PromptScorer(engine)
        self._loop = loop
        self._listener = listener
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._scorings: list[Scoring] = []
        self._leaving = False
        self._ended = home.run(self._run)

    def leave(self) -> None:
        """End after the current step."""

        def set_leaving() -> None:
            self._leaving = True

        self._commands.put(set_leaving)

    def join(self, seconds: float) -> bool:
        """Wait until it has ended; whether it has."""
        return not wait([self._ended], seconds).not_done

    def submit(self, ticket: Ticket) -> None:
        """Queue a sequence."""
        self._commands.put(partial(self._submit, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Forget a sequence; its slot is free at the next step."""
        self._commands.put(partial(self._cancel, ticket))

    def score(self, scoring: Scoring) -> None:
        """Queue a prompt to be scored; setting its ``cancelled`` takes it out again."""
        self._commands.put(partial(self._scorings.append, scoring))

    def _run(self) -> None:
        try:
            while not self._leaving:
                self._run_commands()
                self.step_began = perf_counter()
                events = self._engine.step() if self._engine.busy else []
                self._advance_scoring()
                self.step_began = None
                self._tell(self._listener.stepped, events, self._state())
        except BaseException as error:
            self._tell(self._listener.failed, error)
        finally:
            self._engine.close()

    def _run_commands(self) -> None:
        """Those that have come; sleeps until one does if there is nothing else to do."""
        if not self._engine.busy and not self._scorings:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _submit(self, ticket: Ticket) -> None:
        work = ticket.work
        try:
            ticket.key = self._engine.submit(
                work.prompt,
                work.sampling,
                stop=work.stop,
                stream=work.stream,
                constraint=work.constraint,
            )
        except Qwen2KitError as error:
            self._tell(self._listener.refused, ticket, invalid(str(error)))
        else:
            self._tell(self._listener.accepted, ticket, ticket.key)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.key is not None:
            self._engine.cancel(ticket.key)

    def _advance_scoring(self) -> None:
        """One piece of the oldest prompts, so that generation goes on in between."""
        if not self._scorings:
            return
        for scoring in [item for item in self._scorings if item.cancelled]:
            self._scorer.drop(scoring)
            self._scorings.remove(scoring)
        for scoring, result in self._scorer.advance(self._scorings):
            self._scorings.remove(scoring)
            self._tell(self._listener.scored, scoring, result)

    def _state(self) -> EngineState:
        engine = self._engine
        return EngineState(engine.running, engine.waiting, replace(engine.stats))

    def _tell(self, method: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(partial(method, *arguments))
