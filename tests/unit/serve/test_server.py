"""What is around the application: sockets, connections on which nothing comes."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvicorn

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import ConfigError
from qwen2kit.serve import impatience
from qwen2kit.serve.impatience import ImpatientProtocol
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.own_thread import OwnThread
from qwen2kit.serve.server import Serving, listen, serve

WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_two_that_start_at_once_do_not_share_a_port(loaded: LoadedModel) -> None:
    home = OwnThread("engine")
    engine = home.run(lambda: TextEngine(loaded, slots=1, capacity=64)).result()
    serving = Serving(home=home, loaded=loaded, name="tiny", engine=engine, limits=Limits(slots=1))
    first = listen("127.0.0.1", 0)
    second = listen("127.0.0.1", first.getsockname()[1])  # nobody listens yet
    with first, second:
        first.listen()
        with pytest.raises(ConfigError, match="cannot listen: Address already in use; give"):
            serve(serving, second, lambda: None)


async def _no_content(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.02):
            while await reader.read(4096):
                pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_connections_without_requests_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impatience, "PATIENCE", 0.15)

    async def run(bound: socket.socket) -> list[bool]:
        config = uvicorn.Config(_no_content, http=ImpatientProtocol, lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        address = bound.getsockname()
        while not server.started:
            await asyncio.sleep(0.01)
        silent, half, busy = [await asyncio.open_connection(*address) for _ in range(3)]
        half[1].write(WHOLE + WHOLE[:20])
        for _ in range(8):
            busy[1].write(WHOLE)
            assert b" 204 " in await busy[0].read(4096)
            half[1].write(b"x")
            await asyncio.sleep(0.06)
        closed = [await _is_closed(reader) for reader, _ in (silent, half, busy)]
        for _, writer in (silent, half, busy):
            writer.close()
        server.should_exit = True
        await serving
        return closed

    assert asyncio.run(run(listen("127.0.0.1", 0))) == [True, True, False]
