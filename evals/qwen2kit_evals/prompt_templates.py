"""lm-eval compiles a prompt template anew for every document; here, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def compiled_once() -> Iterator[None]:
    """Inside, lm-eval's Jinja environment remembers the templates it has compiled.

    Nine tenths of the time in which it builds the prompts of mmlu go into compiling the same few
    strings again. A compiled template has no state, so the prompts are the same.
    """
    from lm_eval import utils

    environment = utils.env
    environment.from_string = cache(type(environment).from_string.__get__(environment))
    try:
        yield
    finally:
        del environment.from_string
