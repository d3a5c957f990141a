"""Reading a request within limits, and answering it for as long as its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen2kit.serve.errors import ApiError, invalid
from qwen2kit.serve.fields import refusal
from qwen2kit.serve.sse import DONE, sse

_BODY_SECONDS: Final = 30.0

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


async def read(request: Request, model: type[Model], max_body: int) -> Model:
    """The body, checked.

    A JSON content type is required: browsers then ask before another site's page may send here.

    Raises:
        ApiError: it is no JSON of that shape, packed (415), too large (413) or too slow (408).
        ClientDisconnect: nobody is there any more.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON, with 'Content-Type: application/json'")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise ApiError(415, f"Content-Encoding {coding[:20]!r} is not supported; send plain JSON")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _body(request, max_body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


async def _body(request: Request, most: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > most:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_large
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, ended by ``[DONE]`` or by an error document.

    Args:
        events: what is sent, one or more events at a time.
        release: called when nothing more will be sent, whatever the reason.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], release: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_ended(events), headers=headers)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


async def _ended(events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield sse(error.body)
        return
    yield DONE
