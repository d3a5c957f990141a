"""Triton's interpreter patches its language at every call within a kernel, a third of its time;
here once a launch.

A plugin of pytest (``-p tests.unit.torch.patched_once``). Where Triton has other insides it does
nothing.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_INSIDES = ("_patch_lang", "_LangPatchScope", "GridExecutor")


def _patch_once() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(function: Any) -> Any:
        """What a module calls the language is found in its globals."""
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()
        done.add(module)
        return patch(function)

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        done.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched


if all(hasattr(interpreter, name) for name in _INSIDES):
    _patch_once()
