"""How one of several processes ends when something goes wrong."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def abandon(error: BaseException) -> NoReturn:
    """Say what went wrong and leave without the interpreter's farewell: connections to processes
    that are gone cannot be taken down, and trying to ends in an abort that hides the exit code."""
    from traceback import print_exception

    from qwen2kit.cli.disk_errors import explain
    from qwen2kit.errors import PeerError, Qwen2KitError

    code = 1
    if isinstance(error, Qwen2KitError):
        code = error.exit_code
        if not isinstance(error, PeerError):
            sys.stderr.write(f"error: {error}\n")
    elif isinstance(error, OSError) and (found := explain(error)) is not None:
        message, code = found
        sys.stderr.write(f"error: {message}\n")
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
