"""What happens around every request: the key is checked, and the answer is counted."""

from __future__ import annotations

import hmac
from time import perf_counter
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2kit.serve.errors import ApiError, unauthorized
from qwen2kit.serve.metrics import Metrics

OPEN_PATHS: Final = frozenset({"/", "/health", "/health/live", "/health/ready"})
"""Need no key: they say nothing about the model or its users."""

COUNTED_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models"})


def error_response(error: ApiError) -> JSONResponse:
    """An error as the client sees it."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


class KeyGuard:
    """Lets requests through that carry the key; compares in constant time.

    Args:
        app: what is guarded.
        key: None lets everybody through.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "http" and not self._admits(scope):
            await error_response(unauthorized())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return True
        given = Headers(scope=scope).get("authorization", "").encode()
        return hmac.compare_digest(given, self._expected)


class Counted:
    """Counts answers by endpoint and status, and measures them to their last byte.

    Args:
        app: what is measured.
        metrics: told.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] != "http" or scope["path"] not in COUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        start = perf_counter()
        status = 499  # the client left before an answer began

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            self._metrics.request(scope["path"], status, perf_counter() - start)
