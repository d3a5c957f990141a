"""Who may import whom. The contracts live in pyproject.toml; here they are run, and tried."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.arch.source_tree import PACKAGES, ROOT, name_of, parse, source_files

LINT = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)
FRAMEWORKS = {"torch", "mlx", "mlx_lm", "transformers", "lm_eval", "datasets"}


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=directory, capture_output=True, text=True, check=False
    )


def test_contracts_are_kept() -> None:
    pytest.importorskip("importlinter")
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_a_planted_violation_is_caught(tmp_path: Path) -> None:
    """The contracts of pyproject.toml, on a tiny tree in which core imports torch."""
    pytest.importorskip("importlinter")
    for package in PACKAGES:
        (tmp_path / package / "spec").mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "spec/__init__.py").touch()
    layers = ("backend", "data", "train", "generate", "engine", "chat", "serve", "cli", "config")
    for layer in (*layers, "parity"):
        (tmp_path / "qwen2kit" / f"{layer}.py").touch()
    text = (ROOT / "pyproject.toml").read_text()
    contracts = text[text.index("[tool.importlinter]") :]
    (tmp_path / "pyproject.toml").write_text(contracts)
    clean = "import sys; sys.path.insert(0, '.'); " + LINT
    run = [sys.executable, "-c", clean]

    def broken() -> str:
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout

    assert "0 broken" in broken()
    (tmp_path / "qwen2kit/spec/__init__.py").write_text("def f():\n    import torch\n")
    (tmp_path / "qwen2kit_mlx/__init__.py").write_text("import qwen2kit_torch\n")
    (tmp_path / "qwen2kit/config.py").touch()
    found = broken()
    assert "core never imports a framework, a backend or the evals BROKEN" in found
    assert "backends and evals do not know each other BROKEN" in found


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for item in ast.walk(parse(file)):
        if isinstance(item, ast.Import):
            found |= {alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module and item.level == 0:
            found.add(item.module.split(".")[0])
    return found


def test_core_names_no_framework_anywhere() -> None:
    """Also inside functions and under TYPE_CHECKING."""
    guilty = {
        name_of(file): sorted(_imports(file) & FRAMEWORKS)
        for file in source_files()
        if file.is_relative_to(PACKAGES["qwen2kit"]) and _imports(file) & FRAMEWORKS
    }
    assert guilty == {}


@pytest.mark.parametrize(
    ("package", "strangers"),
    [
        ("qwen2kit_torch", {"mlx", "mlx_lm", "lm_eval", "qwen2kit_mlx", "qwen2kit_evals"}),
        ("qwen2kit_mlx", {"torch", "lm_eval", "qwen2kit_torch", "qwen2kit_evals"}),
        ("qwen2kit_evals", {"torch", "mlx", "mlx_lm", "qwen2kit_torch", "qwen2kit_mlx"}),
    ],
)
def test_backends_and_evals_keep_to_themselves(package: str, strangers: set[str]) -> None:
    guilty = {
        name_of(file): sorted(_imports(file) & strangers)
        for file in source_files()
        if file.is_relative_to(PACKAGES[package]) and _imports(file) & strangers
    }
    assert guilty == {}


def test_every_backend_of_ours_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["qwen2kit.backends"]
    assert {target.split(".")[0] for target in entries.values()} == {
        name for name in PACKAGES if name.endswith(("_torch", "_mlx"))
    }
