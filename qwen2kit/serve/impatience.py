"""Connections on which nothing comes are closed, which uvicorn leaves open for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

PATIENCE = 60.0
"""Seconds; not less than those an idle connection is kept for another request."""


class ImpatientProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """uvicorn's own protocol, which hangs up on who sends no request, or a part of its head only,
    for once to twice `PATIENCE`."""

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._seen: object = None
        self._timer: asyncio.TimerHandle = self.loop.call_later(PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        last = self.cycle
        if last is None or last.response_complete:
            if last is self._seen:
                self.transport.close()
                return
            self._seen = last
        self._timer = self.loop.call_later(PATIENCE, self._look)
