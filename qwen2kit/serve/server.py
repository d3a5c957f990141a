"""One process that serves: socket, signals, and leaving without cutting anybody off."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import disable_created_metrics

from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.serve import collecting, taking_turns
from qwen2kit.serve.app import make_app
from qwen2kit.serve.constraints import Constraints
from qwen2kit.serve.dispatcher import Dispatcher
from qwen2kit.serve.errors import shutting_down
from qwen2kit.serve.impatience import ImpatientProtocol
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.metrics import Metrics
from qwen2kit.serve.own_thread import OwnThread
from qwen2kit.serve.service import Service

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel

_KEEP_ALIVE = 60
_LAST_WORDS = 2.0
"""Seconds for error messages to reach the clients after the grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What to serve and how.

    Attributes:
        home: the thread in which model and engine were made.
        loaded: the model.
        name: its id for clients.
        engine: an idle engine over it.
        limits: bounds on requests.
        api_key: asked of clients; None asks for nothing.
    """

    home: OwnThread
    loaded: LoadedModel
    name: str
    engine: TextEngine
    limits: Limits
    api_key: str | None = None


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        ConfigError: the address is in use, not of this machine, or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "give another --host or --port"
        ) from None
    return bound


def serve(serving: Serving, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs.

    A second signal leaves at once.

    Args:
        serving: what to serve.
        bound: from `listen`.
        ready: called when requests are answered.

    Raises:
        BackendError: the engine broke.
        ConfigError: another process listens there by now.
    """
    with collecting.seldom(), taking_turns.quickly():
        failure = asyncio.run(_serve(serving, bound, ready))
    if failure is not None:
        kind = type(failure).__name__
        raise BackendError(f"the engine failed: {kind}: {failure}") from failure


async def _serve(
    serving: Serving, bound: socket.socket, ready: Callable[[], None]
) -> BaseException | None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    capacity = serving.engine.engine.capacity
    server: _Server | None = None

    def leave(error: BaseException) -> None:
        if server is not None:
            server.should_exit = True

    dispatcher = Dispatcher(
        serving.home,
        serving.engine,
        serving.limits,
        metrics,
        on_failure=leave,
    )
    service = Service(
        name=serving.name,
        loaded=serving.loaded,
        capacity=capacity,
        limits=serving.limits,
        metrics=metrics,
        dispatcher=dispatcher,
        constraints=Constraints(serving.loaded),
    )
    local = ip_address(bound.getsockname()[0]).is_loopback
    config = uvicorn.Config(
        make_app(service, serving.api_key, local=local),
        http=ImpatientProtocol,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=round(serving.limits.grace + _LAST_WORDS),
    )
    server = _Server(config, dispatcher, serving.limits.grace, ready)
    try:
        await server.serve(sockets=[bound])
    finally:
        await dispatcher.close()
    return dispatcher.failure


class _Server(uvicorn.Server):
    """uvicorn, with our own idea of what a signal means."""

    def __init__(
        self,
        config: uvicorn.Config,
        dispatcher: Dispatcher,
        grace: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._dispatcher = dispatcher
        self._grace = grace
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so. Raises ConfigError if somebody else has begun to listen on a socket's
        address since it was bound."""
        try:
            await super().startup(sockets)
        except OSError as error:
            raise ConfigError(
                f"cannot listen: {error.strerror or error}; give another --host or --port"
            ) from None
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on the first signal, leave on the second."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._drain)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _drain(self) -> None:
        if self._dispatcher.draining:
            self.force_exit = True
            self._dispatcher.abort(shutting_down())
            return
        self._dispatcher.draining = True
        self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.call_later(self._grace, self._dispatcher.abort, shutting_down())
