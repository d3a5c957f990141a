"""Triton kernels on a machine without a GPU: a program run under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def run_interpreted(program: str) -> None:
    """Run Python code in a process of its own, where kernels take CPU tensors; it must succeed."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
