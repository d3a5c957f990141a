"""Triton kernels run by Triton's interpreter, on any machine.

Whether kernels are compiled or interpreted is settled once per process, when triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draws", "quantized", "step"])
def test_kernels_compute_what_the_network_does(name: str) -> None:
    options = ["-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-p", "tests.unit.torch.patched_once"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / f"interpreted_{name}.py")],
        cwd=HERE.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
