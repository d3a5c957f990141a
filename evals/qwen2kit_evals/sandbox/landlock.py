"""File access by rule (Landlock, Linux 5.13) where a file system of one's own is not to be had."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from qwen2kit_evals.sandbox.kernel import call

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | 1 << 1 | _READ_FILE | 1 << 14
_RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
_RIGHTS_OF_LATER = 16


def version() -> int:
    """Landlock's ABI version; 0 if this kernel has none."""
    try:
        return call("syscall", ctypes.c_long(_CREATE), None, ctypes.c_size_t(0), _VERSION_FLAG)
    except (OSError, AttributeError):
        return 0


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Only what is below these paths can be opened from now on; needs no_new_privs.

    Paths that do not exist are left out.

    Raises:
        OSError: the kernel refuses.
    """
    rights = (1 << _RIGHTS_OF_VERSION.get(version(), _RIGHTS_OF_LATER)) - 1
    ruleset = struct.pack("=Q", rights)
    handle = _syscall(_CREATE, ctypes.c_char_p(ruleset), ctypes.c_size_t(len(ruleset)), 0)
    for paths, allowed in ((readable, _READ), (writable, rights)):
        for path in filter(os.path.exists, paths):
            _allow(handle, path, allowed & rights)
    _syscall(_RESTRICT, handle, 0)
    os.close(handle)


def _allow(handle: int, path: str, allowed: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & _ON_FILES, opened)
        _syscall(_ADD_RULE, handle, _PATH_BENEATH, ctypes.c_char_p(rule), 0)
    finally:
        os.close(opened)


def _syscall(number: int, *arguments: object) -> int:
    return call("syscall", ctypes.c_long(number), *arguments)
