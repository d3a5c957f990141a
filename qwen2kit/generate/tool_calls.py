"""Function calls in a model's answer, found while the text streams.

The format is the one Qwen2.5 was trained on (Hermes style): one JSON object per call, between
``<tool_call>`` and ``</tool_call>``, as the checkpoint's chat template renders them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_CLOSING_OR_STRING = re.compile(r'(</tool_call>)|"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: the function's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]

    def message(self) -> dict[str, Any]:
        """An entry of a message's ``tool_calls``, as chat templates read it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"type": "function", "function": function}


class ToolCallParser:
    """Separates text from calls, piece by piece.

    Text that may yet turn out to open a call is held back, with the blanks before it. Blanks
    around calls are dropped. What looks like a call but holds no such object stays text, so
    without calls the texts joined are the input.
    """

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Text and calls that became final with ``piece``."""
        self._held += piece
        said: list[str] = []
        calls: list[ToolCall] = []
        while found := self._next_call():
            before, body, end = found
            call = parse_call(body)
            if call is None:
                said.append(self._say(self._held[:end]))
            else:
                said.append(self._say(before.rstrip()))
                calls.append(call)
                self._after_call = True
            self._held = self._held[end:]
        final = _settled(self._held)
        said.append(self._say(self._held[:final]))
        self._held = self._held[final:]
        return "".join(said), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back, now that nothing follows. A last call may lack its closing tag."""
        before, opening, body = self._held.partition(OPENING)
        call = parse_call(body) if opening else None
        said = self._say(self._held if call is None else before.rstrip())
        self._held = ""
        return said, [] if call is None else [call]

    def _next_call(self) -> tuple[str, str, int] | None:
        """Text before the first complete call, its body, and where it ends; None if none is."""
        before, opening, rest = self._held.partition(OPENING)
        if not opening or CLOSING not in rest:
            return None
        for match in _CLOSING_OR_STRING.finditer(rest):
            if match[1]:
                start = len(before) + len(opening)
                return before, rest[: match.start()], start + match.end()
        return None

    def _say(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return text


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """A whole answer as text and calls."""
    parser = ToolCallParser()
    said, calls = parser.push(text)
    rest, last = parser.finish()
    return said + rest, calls + last


def parse_call(body: str) -> ToolCall | None:
    """The call in ``body``, a JSON object with ``name`` and ``arguments``; None if it is none.

    Line breaks inside strings are let pass, and arguments that are themselves JSON text are read:
    models write both. NaN, numbers too large and halves of characters are no JSON that could be
    handed on.
    """
    try:
        found = json.loads(body, strict=False)
        arguments = found.get("arguments", {}) if isinstance(found, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False)
        json.dumps([found, arguments], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or not isinstance(found.get("name"), str):
        return None
    return ToolCall(found["name"], arguments)


def _settled(text: str) -> int:
    """Length of the beginning of ``text`` that no call can swallow any more."""
    at = text.find(OPENING)
    if at < 0:
        longest = min(len(text), len(OPENING) - 1)
        part = next((n for n in range(longest, 0, -1) if text.endswith(OPENING[:n])), 0)
        at = len(text) - part
    return len(text[:at].rstrip())
