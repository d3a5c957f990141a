"""Run the command line as a user does: a fresh interpreter, captured output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# One thread: the models are tiny, and threads that wait for each other cost more than they give.
OFFLINE = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
ALL_THREADS = {"OMP_NUM_THREADS": str(os.cpu_count())}

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
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """``qwen2kit *args`` without network.

    Args:
        hide: comma-separated packages to hide from the interpreter, as if not installed.
    """
    entry = ["-c", HIDE, hide] if hide else ["-m", "qwen2kit"]
    done = subprocess.run(
        [sys.executable, *entry, *map(str, args)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, **OFFLINE, **(env or {})},
        timeout=timeout,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def run_json(*args: str | Path, **options: Any) -> Any:
    """The JSON document that a successful ``qwen2kit *args --json`` writes to stdout."""
    done = run_cli(*args, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
