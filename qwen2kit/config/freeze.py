"""What a run was: the resolved recipe, software versions, git commit and platform, as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen2kit.config.tree import RunConfig

_PACKAGES = ("qwen2kit", "numpy", "tokenizers", "safetensors")


def to_tree(config: RunConfig) -> dict[str, Any]:
    """``config`` as a JSON tree that `qwen2kit.config.load.parse` reads back to an equal value."""
    tree: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return tree


def freeze(config: RunConfig, backend_versions: Mapping[str, str]) -> dict[str, Any]:
    """Everything needed to tell two runs apart: config, versions, git commit, platform."""
    return {
        "config": to_tree(config),
        "versions": {name: version(name) for name in _PACKAGES} | dict(backend_versions),
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": list(sys.argv),
    }


def git_commit() -> str | None:
    """Commit of the checkout this package runs from (``-dirty`` if changed), or None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted paths at which two frozen configs differ."""
    found: list[str] = []
    for key in sorted(a.keys() | b.keys()):
        left, right, where = a.get(key), b.get(key), f"{path}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{where}.")
        elif left != right:
            found.append(where)
    return found
