"""A short run of the load test: no error, bounded memory, a clean exit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("fastapi")
SCRIPT = Path(__file__).parents[2] / "benchmarks/serving.py"


@pytest.mark.slow
def test_fifty_streaming_clients(tmp_path: Path) -> None:
    if not installed():
        pytest.skip("no backend installed")
    write_tiny_checkpoint(tmp_path / "tiny")
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), str(tmp_path / "tiny"), "--clients", "50",
            "--seconds", "6", "--words", "12", "--new", "4,32",
            "--output", str(tmp_path / "load.json"), "--", "--slots", "16",
        ],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["errors"] == 0
    assert found["requests"] >= 50
    assert found["exit_code"] == 0
    assert found["first_token_ms"]["p50"] > 0
    assert found["memory"]["end_mb"] - found["memory"]["warm_mb"] < 64
