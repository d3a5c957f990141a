"""A Jinja environment in which a checkpoint's template can do nothing but build a bounded string.

Jinja's immutable sandbox blocks attribute escapes but not exhaustion. Here every loop step and
call, and the text that operators and filters produce, is charged to a budget, so that a hostile
template ends in an error instead of eating time or memory.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from qwen2kit.tokenizer.template_limits import (
    BUDGET,
    TemplateLimitError,
    bounded_filters,
    join_text,
    replace_text,
)

_HIDDEN_STR_METHODS = frozenset(
    {"center", "encode", "expandtabs", "format", "format_map"}
    | {"ljust", "rjust", "translate", "zfill"}
)
_MAX_INTEGER_BYTES = 1024
_GLOBALS = ("range", "dict", "namespace")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with budgets, the globals chat templates expect, and only pure filters."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationTag],
            finalize=_finalize,
        )
        self.filters = bounded_filters(self.filters)
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Metered().visit(tree)  # type: ignore[no-any-return]

    def wrap_str_format(self, value: Any) -> None:
        """Format strings get no special treatment here: `is_safe_attribute` hides them."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also hides the string methods whose output can be far larger than their input."""
        if isinstance(obj, str) and attr in _HIDDEN_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call expression of a template ends up here."""
        budget = BUDGET.get()
        budget.call()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            budget.text(len(owner))
            if name == "replace":
                return replace_text(owner, *args, **kwargs)
            if name == "join":
                return join_text(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make large values."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateLimitError(f"operator {operator} is not available")
        if operator != "%":
            BUDGET.get().text(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)


class GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks assistant text; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Routes loops and ``~`` through the filters that charge for them."""

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


def _result_size(operator: str, left: Any, right: Any) -> int:
    sizes = _size(left), _size(right)
    if isinstance(left, int) and isinstance(right, int) and sum(sizes) > _MAX_INTEGER_BYTES:
        raise TemplateLimitError(f"an integer of more than {_MAX_INTEGER_BYTES} bytes")
    if operator == "*" and isinstance(left, int) != isinstance(right, int):
        return sizes[0] * right if isinstance(right, int) else sizes[1] * left
    return sum(sizes)


def _size(value: object) -> int:
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, str | list | tuple) else 0


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        BUDGET.get().value(value)
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise TemplateLimitError("strftime_now takes at most 100 characters")
    return datetime.now().strftime(pattern)
