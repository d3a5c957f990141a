"""Whether kernels written in Triton can run here."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec


def has_triton() -> bool:
    """Whether Triton is there, and the C compiler with which it builds its launchers."""
    return _found(os.environ.get("CC"), os.environ.get("PATH"))


@cache  # asked at every step
def _found(compiler: str | None, path: str | None) -> bool:
    compilers = (compiler, shutil.which("clang", path=path), shutil.which("gcc", path=path))
    return find_spec("triton") is not None and any(compilers)
