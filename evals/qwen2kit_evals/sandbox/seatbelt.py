"""macOS's sandbox for the current process (``sandbox_init``): files, network, new processes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

_LIBRARY = "/usr/lib/libSystem.dylib"
_SYSTEM = ("/usr", "/bin", "/System", "/Library", "/opt", "/dev", "/private/var/db")


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Apply `profile` from now on.

    Raises:
        OSError: macOS refuses it.
    """
    library = ctypes.CDLL(_LIBRARY)
    message = ctypes.c_char_p()
    text = profile(readable, writable).encode()
    if library.sandbox_init(text, ctypes.c_uint64(0), ctypes.byref(message)):
        raise OSError(0, (message.value or b"refused").decode(errors="replace"), "sandbox_init")


def profile(readable: Sequence[str], writable: Sequence[str]) -> str:
    """Rules: read the system and ``readable``, write below ``writable``; no network, no new
    processes, no signals to others."""
    return "\n".join(
        [
            "(version 1)",
            "(allow default)",
            "(deny network*)",
            "(deny process-fork)",
            "(deny signal (target others))",
            "(deny file-write*)",
            f'(allow file-write* (literal "/dev/null") {_below(writable)})',
            "(deny file-read-data)",
            f"(allow file-read-data {_below([*_SYSTEM, *readable, *writable])})",
        ]
    )


def _below(paths: Sequence[str]) -> str:
    quoted = (path.replace("\\", "\\\\").replace('"', '\\"') for path in paths)
    return " ".join(f'(subpath "{path}")' for path in quoted)
