"""Tests that silently disappear are noticed: a floor under the number of them per folder."""

from __future__ import annotations

import ast

import pytest

from tests.arch.source_tree import PACKAGES, ROOT, functions, parse

# Test functions, each often parametrised. Raise a floor when a folder grows.
FLOORS = {
    "arch": 36,
    "cli": 154,
    "parallel": 13,
    "parity": 26,
    "slurm": 4,
    "unit/adapters": 26,
    "unit/backend": 7,
    "unit/bench": 8,
    "unit/chat": 26,
    "unit/config": 11,
    "unit/data": 78,
    "unit/engine": 63,
    "unit/evals": 159,
    "unit/generate": 36,
    "unit/launch": 6,
    "unit/mlx": 70,
    "unit/parity": 18,
    "unit/plan": 74,
    "unit/serve": 26,
    "unit/spec": 40,
    "unit/tokenizer": 65,
    "unit/torch": 110,
    "unit/train": 56,
    "unit/weights": 115,
}


def count(folder: str) -> int:
    return sum(
        function.name.startswith("test_")
        for file in (ROOT / "tests" / folder).rglob("test_*.py")
        for function in functions(parse(file))
    )


@pytest.mark.parametrize("folder", FLOORS)
def test_folder_has_its_tests(folder: str) -> None:
    assert count(folder) >= FLOORS[folder]


def test_unit_tests_mirror_the_packages() -> None:
    layers = {item.parent.name for item in PACKAGES["qwen2kit"].glob("*/__init__.py")}
    entries = {item.name for item in (ROOT / "tests/unit").iterdir()} - {"__pycache__"}
    assert entries <= layers | {"torch", "mlx", "evals"}


def test_no_test_can_pass_without_asserting() -> None:
    """Every test function asserts, expects an exception, or calls something that checks."""
    checks = (ast.Assert, ast.Raise)
    idle = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for function in functions(parse(file)):
            if not function.name.startswith("test_"):
                continue
            nodes = list(ast.walk(function))
            calls = [ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)]
            if not any(isinstance(n, checks) for n in nodes) and not calls:
                idle.append(f"{file.name}:{function.name}")
    assert idle == []
