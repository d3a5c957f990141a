"""What a failing disk is called on the command line."""

from __future__ import annotations

import errno

from qwen2kit.partial_file import is_full

_OF_A_DISK = (errno.EROFS, errno.EIO, errno.ESTALE)


def explain(error: OSError) -> tuple[str, int] | None:
    """The line to print and the exit code; None if the error is of no disk or file.

    What fails while a file is written names no file.
    """
    if is_full(error):
        return f"no space left on device while writing {error.filename or 'output'}", 11
    if error.filename is not None:
        return f"{error.strerror}: {error.filename}", 10
    if error.errno in _OF_A_DISK:
        return f"{error.strerror} while reading or writing a file", 10
    return None
