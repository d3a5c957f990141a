"""A row's columns -> a document's text, or a conversation's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2kit.config.data_tree import (
    AlpacaFormat,
    MessagesFormat,
    PromptResponseFormat,
    RowFormat,
    ShareGPTFormat,
    TextFormat,
)
from qwen2kit.data.rows import Row

Message = dict[str, str]

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def to_text(row: Row, format: TextFormat) -> str:
    """The document in ``row``.

    Raises:
        DataError: the column is missing or is not text.
    """
    return _text(row, row.value, format.column)


def to_messages(row: Row, format: RowFormat, system: str | None) -> list[Message]:
    """The conversation in ``row``, with ``system`` put in front if it has no system message.

    Raises:
        DataError: a column is missing or of the wrong type, a role is unknown, a message calls
            tools or has a weight other than 1, or no assistant message has text.
    """
    messages = _read(row, format)
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise row.error("no assistant message with text to learn from")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _read(row: Row, format: RowFormat) -> list[Message]:
    if isinstance(format, MessagesFormat):
        return _turns(row, format.column, "role", "content", {role: role for role in _ROLES})
    if isinstance(format, ShareGPTFormat):
        turns = _turns(row, format.column, "from", "value", _SHAREGPT_ROLES)
        return _own_system(row) + turns
    if isinstance(format, AlpacaFormat):
        prompt = _text(row, row.value, format.instruction)
        extra = row.value.get(format.input)
        if extra is not None and not isinstance(extra, str):
            raise row.error(f"{format.input!r} must be text, got {type(extra).__name__}")
        prompt = f"{prompt}\n{extra}" if extra else prompt
        return [*_own_system(row), *_pair(prompt, _text(row, row.value, format.output))]
    assert isinstance(format, PromptResponseFormat)
    return _pair(_text(row, row.value, format.prompt), _text(row, row.value, format.response))


def _pair(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _own_system(row: Row) -> list[Message]:
    system = row.value.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system else []


def _turns(
    row: Row, column: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> list[Message]:
    turns = row.value.get(column)
    if not isinstance(turns, list) or not turns:
        raise row.error(f"{column!r} must be a non-empty list of messages" + _columns(row, column))
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise row.error(f"{column}[{index}] must be an object, got {type(turn).__name__}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise row.error(
                f"{column}[{index}].{role_key} is {role!r}; known: {', '.join(sorted(roles))}"
            )
        _check_all_is_read(row, turn, f"{column}[{index}]")
        content = _text(row, turn, text_key, f"{column}[{index}].")
        messages.append({"role": roles[role], "content": content})
    return messages


def _check_all_is_read(row: Row, turn: Mapping[str, Any], place: str) -> None:
    """Of a turn its role and text are read; refuse what would silently change what is learned."""
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise row.error(f"{place}.{key} is not read; write the call into its text")
    if turn.get("weight") not in (None, 1):
        raise row.error(
            f"{place}.weight is {turn['weight']!r}, but every answer counts; leave the row out"
        )


def _text(row: Row, columns: Mapping[str, Any], key: str, prefix: str = "") -> str:
    value = columns.get(key)
    if not isinstance(value, str):
        problem = "is missing" if key not in columns else f"is {type(value).__name__}"
        raise row.error(f"{prefix}{key} must be text but {problem}" + _columns(row, key))
    return value


def _columns(row: Row, key: str) -> str:
    return "" if key in row.value else f" (columns: {', '.join(map(str, row.value))})"
