"""Contestants of a benchmark, each in a process of its own with a time limit.

One that fails or takes too long leaves the others' results, and its own as far as it had told them;
results are appended to a JSON file as they come. No contestant outlives the script: what goes on
using the GPU would slow down whatever is measured next.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_MARK = "RESULT "
_SO_FAR = "SO FAR "
_SHOWN = 300
_running: set[subprocess.Popen[str]] = set()


def announce(result: dict[str, Any]) -> None:
    """What a contestant's process says at its end."""
    print(_MARK + json.dumps(result), flush=True)


def so_far(result: dict[str, Any]) -> None:
    """What a contestant would announce if it ended now: shown, and kept if it does."""
    print(_SO_FAR + json.dumps(result), flush=True)


def run_alone(arguments: list[str], limit: float) -> dict[str, Any]:
    """Run this script again with ``arguments``; what it announced last, or an ``error``."""
    return run([sys.executable, sys.argv[0], *arguments], limit)[-1]


def run(command: list[str], limit: float) -> list[dict[str, Any]]:
    """Everything that ``command`` announced, or what it had `so_far`, with a line of ``error``
    if it failed or of ``cut_off`` if it took too long (without anything said that is an error too).

    Args:
        limit: seconds after which it and everything it has started is killed.
    """
    late = threading.Event()
    found: list[dict[str, Any]] = []
    partial: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        _running.add(child)
        timer = threading.Timer(limit, lambda: (late.set(), _kill(child)))
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(_MARK):
                    found.append(json.loads(line.removeprefix(_MARK)))
                elif line.startswith(_SO_FAR):
                    partial = json.loads(line.removeprefix(_SO_FAR))
                    print(line.strip()[:_SHOWN], flush=True)
            child.wait()
        finally:
            timer.cancel()
            _kill(child)
            _running.discard(child)
        if found:
            return found
        if late.is_set():
            word = "cut_off" if partial else "error"
            return [partial | {word: f"stopped after {limit:g} s"}]
        errors.seek(0)
        return [partial | {"error": _last_error(errors.read(), child.returncode)}]


def _last_error(text: str, code: int) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or [f"ended with {code}"])[-1][:300]


def _kill(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _end(number: int, frame: Any) -> None:
    """Take the contestants along."""
    for child in tuple(_running):
        _kill(child)
    os._exit(128 + number)


signal.signal(signal.SIGTERM, _end)


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
