"""``python -m qwen2kit.backend.conformance NAME``: run the suite on a registered backend."""

from __future__ import annotations

import sys

from qwen2kit.backend.conformance import run_conformance
from qwen2kit.backend.registry import get
from qwen2kit.errors import Qwen2KitError


def main() -> int:
    """Print one line per case; 0 if the backend conforms, 1 if not, 2 on wrong usage."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m qwen2kit.backend.conformance BACKEND\n")
        return 2
    try:
        report = run_conformance(get(sys.argv[1]))
    except Qwen2KitError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(report.text() + "\n")
    return 0 if report.ok else 1


raise SystemExit(main())
