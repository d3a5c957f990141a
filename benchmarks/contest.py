"""Contestants of a benchmark, each in a process of its own with a time limit.

One that fails or takes too long leaves the others' results; results are appended to a JSON file as
they come.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_MARK = "RESULT "


def announce(result: dict[str, Any]) -> None:
    """What a contestant's process says at its end."""
    print(_MARK + json.dumps(result), flush=True)


def run_alone(arguments: list[str], limit: float) -> dict[str, Any]:
    """Run this script again with ``arguments``; what it announced last, or an ``error``."""
    return run([sys.executable, sys.argv[0], *arguments], limit)[-1]


def run(command: list[str], limit: float) -> list[dict[str, Any]]:
    """Everything that ``command`` announced, or one ``{"error": line}``.

    Args:
        limit: seconds after which it and everything it has started is killed.
    """
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        said, errors = child.communicate()
        errors = f"stopped after {limit:g} s"
    lines = [line.removeprefix(_MARK) for line in said.splitlines() if line.startswith(_MARK)]
    if lines:
        return [json.loads(line) for line in lines]
    lines = [line for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return [{"error": (named or lines or [f"ended with {child.returncode}"])[-1][:300]}]


def append(path: Path | None, row: dict[str, Any]) -> None:
    """Add ``row`` to the JSON list in ``path``, if there is one."""
    if path is None:
        return
    rows = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*rows, row], indent=2) + "\n")


def environment() -> dict[str, Any]:
    """The GPU and the versions of what ran."""
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("transformers", "peft", "bitsandbytes", "liger-kernel", "triton", "torchao"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found
