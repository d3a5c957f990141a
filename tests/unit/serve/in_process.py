"""A service inside the test's own event loop, and engines that do as they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx

from qwen2kit.backend.loading import LoadedModel, load_model
from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.engine.stats import EngineStats
from qwen2kit.engine.text import TextEngine, TextEvent
from qwen2kit.generate.sampling import Sampling
from qwen2kit.serve.app import make_app
from qwen2kit.serve.constraints import Constraints
from qwen2kit.serve.dispatcher import Dispatcher
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.metrics import Metrics
from qwen2kit.serve.own_thread import OwnThread
from qwen2kit.serve.service import Service
from tests.tiny_checkpoint import write_tiny_checkpoint

CAPACITY = 256


@cache
def tiny_model(directory: Path) -> LoadedModel:
    """A random model of 256 positions, written to ``directory`` and loaded."""
    write_tiny_checkpoint(directory)
    return load_model(directory)


class ScriptedEngine:
    """Says ``text`` to everybody, one token per step, as long as the test lets it.

    Args:
        text: ASCII.
        go: steps wait for it.
        pause: seconds a step takes.

    Attributes:
        running_keys: sequences that hold a slot.
        error: raised by the next step, if set.
        closed: the thread has let it go.
    """

    def __init__(self, text: str, go: threading.Event | None = None, pause: float = 0) -> None:
        self.running_keys: dict[int, int] = {}
        self.error: Exception | None = None
        self.closed = False
        self.stats = EngineStats()
        self._text = text
        self._go = go
        self._pause = pause
        self._key = 0

    @property
    def busy(self) -> bool:
        return bool(self.running_keys)

    @property
    def running(self) -> int:
        return len(self.running_keys)

    waiting = 0

    def submit(self, prompt: Sequence[int], sampling: Sampling, **_: Any) -> int:
        self._key += 1
        self.running_keys[self._key] = 0
        return self._key

    def cancel(self, key: int) -> None:
        self.running_keys.pop(key, None)

    def step(self) -> list[TextEvent]:
        if self._go is not None:
            self._go.wait(10)
        time.sleep(self._pause)
        if self.error is not None:
            raise self.error
        events = []
        for key, position in list(self.running_keys.items()):
            last = position == len(self._text) - 1
            reason = "stop" if last else None
            letter = self._text[position]
            self.running_keys[key] += 1
            self.stats.generated_tokens += 1
            events.append(TextEvent(key, letter, (TokenEvent(key, ord(letter), reason),), reason))
            if last:
                del self.running_keys[key]
        return events

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def serving(
    loaded: LoadedModel,
    *,
    engine: ScriptedEngine | None = None,
    limits: Limits | None = None,
    capacity: int = CAPACITY,
    key: str | None = None,
    failures: list[BaseException] | None = None,
) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """A service and a client of it, without a socket between them."""
    limits = limits or Limits()
    metrics = Metrics()
    home = OwnThread("engine")
    dispatcher = Dispatcher(
        home,
        cast(TextEngine, engine)
        or home.run(lambda: TextEngine(loaded, slots=limits.slots, capacity=capacity)).result(),
        limits,
        metrics,
        on_failure=(failures if failures is not None else []).append,
    )
    service = Service(
        name="tiny",
        loaded=loaded,
        capacity=capacity,
        limits=limits,
        metrics=metrics,
        dispatcher=dispatcher,
        constraints=Constraints(loaded),
    )
    transport = httpx.ASGITransport(make_app(service, key))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield service, client
    finally:
        await dispatcher.close()
