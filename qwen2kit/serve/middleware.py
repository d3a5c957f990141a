"""What happens around every request: the key is checked, and the answer is counted."""

from __future__ import annotations

import hmac
import re
from ipaddress import ip_address
from time import perf_counter
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2kit.serve.errors import ApiError, foreign_host, unauthorized
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
        self._expected = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "http" and not self._admits(scope):
            await error_response(unauthorized())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        equal = hmac.compare_digest(given.strip().encode(), self._expected)
        return equal and scheme.lower() == "bearer"


class HostGuard:
    """Keeps those out who reach this machine under a public name. A page elsewhere can give its own
    name the address of a server on localhost (DNS rebinding); its requests still carry that name.

    Args:
        app: what is guarded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "http" and _is_public(Headers(scope=scope).get("host", "")):
            await error_response(foreign_host())(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _is_public(host: str) -> bool:
    """Whether anybody may have registered the name; addresses and local names are nobody's."""
    name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
    if "." not in name or name.endswith((".localhost", ".local", ".internal")):
        return False
    try:
        ip_address(name)
    except ValueError:
        return True
    return False


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
