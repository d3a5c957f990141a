"""What tests that have MLX compile for CPUs share."""

from __future__ import annotations

from collections.abc import Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path
from tempfile import gettempdir

import pytest


@pytest.fixture
def compiler() -> Iterator[None]:
    """One test at a time: the code lies in files that all processes share, and one process would
    load what another is still writing."""
    with (Path(gettempdir()) / "qwen2kit-mlx-compiler.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        yield
