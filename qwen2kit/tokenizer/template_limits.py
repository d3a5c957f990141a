"""What a chat template may use up, and the filters that charge for what they make."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import jinja2

MAX_STEPS = 1_000_000
MAX_CHARS = 1 << 27
MAX_OUTPUT = 1 << 25
MAX_SECONDS = 5.0
_CALL_STEPS = 5

_PLAIN_FILTERS = """abs capitalize count d default dictsort e escape first float groupby int items
last length list lower map max min reject rejectattr reverse round safe select selectattr sort
string sum title trim unique upper"""


class TemplateLimitError(jinja2.TemplateError):
    """A template asked for more loop steps, calls, time or text than any chat needs."""


@dataclass(slots=True)
class Budget:
    """What one rendering may still use; time is processor time of this thread."""

    steps: int = MAX_STEPS
    chars: int = MAX_CHARS
    deadline: float = field(default_factory=lambda: time.thread_time() + MAX_SECONDS)

    def step(self, count: int = 1) -> None:
        """Charge loop iterations."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateLimitError(f"more than {MAX_STEPS} loop steps")
        if time.thread_time() > self.deadline:
            raise TemplateLimitError(f"more than {MAX_SECONDS:g} s of processor time")

    def call(self) -> None:
        """Charge a call of a function, method or macro."""
        self.step(_CALL_STEPS)

    def text(self, size: int) -> None:
        """Charge characters or list items before they are made."""
        self.chars -= max(size, 0)
        if self.chars < 0:
            raise TemplateLimitError(f"more than {MAX_CHARS} characters produced")

    def value(self, value: object) -> None:
        """Charge a value that is about to be spelled out; shared parts count each time."""
        if isinstance(value, str):
            self.text(len(value))
        elif isinstance(value, dict):
            self.step(len(value))
            for key, item in value.items():
                self.value(key)
                self.value(item)
        elif isinstance(value, list | tuple):
            self.step(len(value))
            for item in value:
                self.value(item)


BUDGET: ContextVar[Budget] = ContextVar("template_budget")


def bounded_filters(builtin: dict[str, Any]) -> dict[str, Any]:
    """The filters templates may use: Jinja's pure ones and ours, each charging its arguments."""
    filters = {name: builtin[name] for name in _PLAIN_FILTERS.split()}
    filters |= {
        "tojson": _tojson,
        "replace": replace_text,
        "join": _join(builtin["join"]),
        "indent": _indent(builtin["indent"]),
        "batch": _sized(builtin["batch"]),
        "slice": _sized(builtin["slice"]),
        "_concat": _concat,
    }
    return {name: _charged(made) for name, made in filters.items()} | {"_counted": _counted}


def join_text(separator: str, values: Iterable[str]) -> str:
    """``separator.join(values)``, charged first."""
    parts = list(_counted(values))
    BUDGET.get().text(sum(len(part) for part in parts) + len(separator) * len(parts))
    return separator.join(parts)


def replace_text(text: str, old: str, new: str, count: int | None = None) -> str:
    """``text.replace(old, new, count)``, charged first."""
    text, old, new = str(text), str(old), str(new)
    BUDGET.get().text(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _charged(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)  # keeps Jinja's marks for filters that take the context
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        for value in (*args, *kwargs.values()):
            budget.value(value)
        return plain(*args, **kwargs)

    return charged


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    budget = BUDGET.get()
    for value in values:
        budget.step()
        yield value


def _concat(values: list[Any]) -> str:
    return "".join(str(value) for value in values)


def _join(plain: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        parts = list(_counted(value))
        budget = BUDGET.get()
        budget.value(parts)
        budget.text(len(d) * len(parts))
        return plain(context, parts, d, attribute)

    return join


def _indent(plain: Callable[..., Any]) -> Callable[..., Any]:
    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        step = width if isinstance(width, int) else len(width)
        BUDGET.get().text(step * (s.count("\n") + 1))
        return plain(s, width, first, blank)

    return indent


def _sized(plain: Callable[..., Any]) -> Callable[..., Any]:
    def sized(value: Iterable[Any], count: int, fill_with: Any = None) -> Any:
        BUDGET.get().text(count)
        return plain(value, count, fill_with)

    return sized


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and indent > 16:
        raise TemplateLimitError("tojson indents by at most 16")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
