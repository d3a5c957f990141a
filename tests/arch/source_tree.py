"""The shipped source files, parsed once for all architecture rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "qwen2kit": ROOT / "qwen2kit",
    "qwen2kit_torch": ROOT / "backends/qwen2kit_torch",
    "qwen2kit_mlx": ROOT / "backends/qwen2kit_mlx",
    "qwen2kit_evals": ROOT / "evals/qwen2kit_evals",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def source_files() -> tuple[Path, ...]:
    """Python files of the four packages."""
    return tuple(sorted(file for root in PACKAGES.values() for file in root.rglob("*.py")))


@cache
def parse(file: Path) -> ast.Module:
    """Syntax tree of ``file``."""
    return ast.parse(file.read_text(), str(file))


def name_of(file: Path) -> str:
    """Path relative to the checkout, for messages and test ids."""
    return str(file.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods, nested ones included."""
    for item in ast.walk(tree):
        if isinstance(item, Function):
            yield item
