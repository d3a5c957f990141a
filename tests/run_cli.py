"""Run the command line as a user does: a process of its own, captured output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.warm_cli import WarmStart

# One thread: a thread that waits for another, which another test keeps from running, spins.
OFFLINE = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}

# What torch and lm-eval set in a process that imports them.
_SET_BY_IMPORTS = {"TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE"}

# Makes the named top-level packages look uninstalled, then runs the CLI.
HIDE = """
import importlib.util, sys
hidden = set(sys.argv.pop(1).split(","))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
find = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.split(".")[0] in hidden else find(name, package)
importlib.util.find_spec = find_spec
from qwen2kit.cli.app import main
sys.argv[0] = "qwen2kit"
main()
"""


def run_cli(
    *args: str | Path,
    stdin: str | bytes = "",
    cwd: Path | None = None,
    hide: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``qwen2kit *args`` without network.

    Args:
        hide: comma-separated packages to hide from the interpreter, as if not installed.
        env: variables to set or change.
        timeout: seconds; for what hangs, however slow the machine is.
        cold: start an interpreter, rather than fork one that has imported torch.
    """
    data = stdin.encode() if isinstance(stdin, str) else stdin
    environment = user_environment() | OFFLINE | dict(env or {})
    arguments = list(map(str, args))
    if not (cold or hide) and hasattr(os, "fork") and _warm().fits(environment):
        code, out, err = _warm().run(
            arguments, stdin=data, cwd=cwd or Path.cwd(), environment=environment, timeout=timeout
        )
        return subprocess.CompletedProcess(arguments, code, out.decode(), err.decode())
    entry = ["-c", HIDE, hide] if hide else ["-m", "qwen2kit"]
    done = subprocess.run(
        [sys.executable, *entry, *arguments],
        input=data, capture_output=True, cwd=cwd, env=environment, timeout=timeout, check=False,
    )  # fmt: skip
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def user_environment() -> dict[str, str]:
    """This process's environment, without what its own imports have added."""
    return {name: value for name, value in os.environ.items() if name not in _SET_BY_IMPORTS}


@cache
def _warm() -> WarmStart:
    return WarmStart(user_environment() | OFFLINE)


def run_json(*args: str | Path, **options: Any) -> Any:
    """The JSON document that a successful ``qwen2kit *args --json`` writes to stdout."""
    done = run_cli(*args, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
