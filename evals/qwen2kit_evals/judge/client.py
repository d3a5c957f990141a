"""The judge: a server that speaks OpenAI's chat-completions interface over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from qwen2kit.errors import BackendError, ConfigError

KEY_VARIABLE = "QWEN2KIT_JUDGE_KEY"
_PATH = "/chat/completions"
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeServer:
    """Where the judge is and how to ask it.

    Attributes:
        url: base address, e.g. ``http://localhost:8000/v1``.
        model: the judge's name there.
        key: sent as bearer token; never written anywhere.
        max_tokens: length limit of a judgment.
        timeout: seconds for one request.
        retries: further attempts when the server is busy, failing or out of reach.
        pause: seconds before the first of them, doubled each time.

    Raises:
        ConfigError: the address is not an HTTP one, or the model has no name.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    max_tokens: int = 1024
    timeout: float = 300.0
    retries: int = 6
    pause: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--judge-url must begin with http:// or https://, got {self.url!r}")
        if not self.model:
            raise ConfigError("name the judge's model with --judge-model")

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The judge's answer, drawn at temperature 0.

        Raises:
            BackendError: it refuses, is out of reach, or answers something else.
        """
        request = self._request(messages)
        for attempt in range(self.retries + 1):
            try:
                return self._answer(request)
            except (OSError, http.client.HTTPException) as error:
                if not _passes(error):
                    raise BackendError(self._explain(error)) from error
                if attempt == self.retries:
                    tries = f"; gave up after {attempt + 1} attempts"
                    raise BackendError(self._explain(error) + tries) from error
                time.sleep(_pause(error, self.pause * 2**attempt))
        raise AssertionError("the last attempt returns or raises")

    def _request(self, messages: Sequence[Mapping[str, str]]) -> urllib.request.Request:
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        base = self.url.rstrip("/")
        address = base if base.endswith(_PATH) else base + _PATH
        return urllib.request.Request(address, json.dumps(body).encode(), headers)

    def _answer(self, request: urllib.request.Request) -> str:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=self.timeout) as response:
            content = response.read()
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise BackendError(f"the judge at {self.url} does not answer like OpenAI's") from error
        return str(text or "")

    def _explain(self, error: Exception) -> str:
        if not isinstance(error, urllib.error.HTTPError):
            reason = getattr(error, "reason", None) or error
            return f"the judge at {self.url} is out of reach: {reason}"
        advice = f"; check {KEY_VARIABLE}" if error.code in (401, 403) else ""
        return f"the judge at {self.url} refuses: {error.code} {_message(error)}{advice}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(
        self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Follow none."""


def key_from_environment() -> str | None:
    """The judge's key, or None."""
    return os.environ.get(KEY_VARIABLE) or None


def _passes(error: Exception) -> bool:
    return not isinstance(error, urllib.error.HTTPError) or error.code in _PASSING


def _pause(error: Exception, otherwise: float) -> float:
    wanted = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    try:
        return min(float(wanted or otherwise), _LONGEST_PAUSE)
    except ValueError:  # a date
        return min(otherwise, _LONGEST_PAUSE)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read())["error"]
        return str(said["message"] if isinstance(said, dict) else said)[:200]
    except (ValueError, LookupError, TypeError, OSError):
        return error.reason
