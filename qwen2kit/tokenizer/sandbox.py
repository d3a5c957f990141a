"""A Jinja environment in which a checkpoint's template can do nothing but build a bounded string.

Jinja's immutable sandbox blocks attribute escapes but not exhaustion. Here every loop step and
call, and every character that an operator produces, is charged to a budget, so that a hostile
template ends in an error instead of eating time or memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_CHARS = 1 << 28
MAX_OUTPUT = 1 << 25

_FILTERS = frozenset(
    [
        "abs",
        "batch",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "groupby",
        "indent",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "slice",
        "sort",
        "string",
        "sum",
        "title",
        "tojson",
        "trim",
        "unique",
        "upper",
    ]
)
_HIDDEN_STR_METHODS = frozenset(
    [
        "center",
        "encode",
        "expandtabs",
        "format",
        "format_map",
        "ljust",
        "rjust",
        "translate",
        "zfill",
    ]
)


class TemplateLimitError(jinja2.TemplateError):
    """A template asked for more loop steps, calls or text than any chat needs."""


@dataclass(slots=True)
class Budget:
    """What one rendering may still use."""

    steps: int = MAX_STEPS
    chars: int = MAX_CHARS

    def step(self) -> None:
        """Charge one loop iteration or call."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimitError(f"more than {MAX_STEPS} loop steps and calls")

    def text(self, size: int) -> None:
        """Charge text, or list items, before they are made."""
        self.chars -= size
        if self.chars < 0:
            raise TemplateLimitError(f"more than {MAX_CHARS} characters produced")


BUDGET: ContextVar[Budget] = ContextVar("template_budget")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with budgets, the globals chat templates expect, and only pure filters."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters |= {
            "tojson": _tojson,
            "replace": _replace,
            "join": _join(self.filters["join"]),
            "indent": _indent(self.filters["indent"]),
            "batch": _sized(self.filters["batch"]),
            "slice": _sized(self.filters["slice"]),
            "_counted": _counted,
            "_concat": _concat,
        }
        kept = ("range", "dict", "namespace")
        self.globals = {name: self.globals[name] for name in kept}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Metered().visit(tree)  # type: ignore[no-any-return]

    def wrap_str_format(self, value: Any) -> None:
        """Format strings get no special treatment here: `is_safe_attribute` hides them."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _HIDDEN_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        BUDGET.get().step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return _join_text(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateLimitError(f"operator {operator} is not available")
        if operator == "*":
            budget.text(_size(left) * right if isinstance(right, int) else 0)
            budget.text(_size(right) * left if isinstance(left, int) else 0)
        elif operator == "+":
            budget.text(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


class GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks assistant text; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateLimitError("recursive loops are not available")
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")


def _filter(value: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, value), name, [], [], None, None, lineno=value.lineno)


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() // 8
    return len(value) if isinstance(value, str | list | tuple) else 0


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    budget = BUDGET.get()
    for value in values:
        budget.step()
        yield value


def _concat(values: list[Any]) -> str:
    return _join_text("", [str(value) for value in values])


def _join_text(separator: str, values: Iterable[str]) -> str:
    parts = list(values)
    BUDGET.get().text(sum(len(part) for part in parts) + len(separator) * len(parts))
    return separator.join(parts)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    limit = -1 if count is None else count
    BUDGET.get().text(len(text) + text.count(old) * len(new))
    return text.replace(old, new, limit)


def _join(plain: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        parts = list(_counted(value))
        size = sum(_size(part) for part in parts) if attribute is None else 0
        BUDGET.get().text(size + len(d) * len(parts))
        return plain(context, parts, d, attribute)

    return join


def _indent(plain: Callable[..., Any]) -> Callable[..., Any]:
    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        step = width if isinstance(width, int) else len(width)
        BUDGET.get().text(len(s) + step * (s.count("\n") + 1))
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
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    BUDGET.get().text(len(text))
    return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise TemplateLimitError("strftime_now takes at most 100 characters")
    return datetime.now().strftime(pattern)
