"""Server-sent events, and those of one stream that differ in nothing but their text."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, Final

DONE: Final = "data: [DONE]\n\n"
"""The end of a stream."""

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sse(document: dict[str, Any]) -> str:
    """One event: JSON in one line."""
    return f"data: {_ENCODER.encode(document)}\n\n"


class TextEvents:
    """Events made from a pattern: everything but the text is encoded once.

    Args:
        make: the document around a text.
    """

    def __init__(self, make: Callable[[str], dict[str, Any]]) -> None:
        mark = secrets.token_hex(16)
        self._before, self._after = sse(make(mark)).split(f'"{mark}"')

    def around(self, text: str) -> str:
        """What `sse` gives for the document of ``text``."""
        return f"{self._before}{_ENCODER.encode(text)}{self._after}"
