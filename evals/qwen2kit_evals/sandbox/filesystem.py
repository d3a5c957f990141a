"""A root directory of one's own: interpreter and libraries read-only, ``/tmp`` in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qwen2kit_evals.sandbox.kernel import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
    pivot_into,
)

WORK_DIRECTORY = "/tmp"
_STAGE = "/proc"
"""Where the new root is built: exists everywhere, holds nothing that the new root shows."""

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ROOT_OPTIONS = "size=1m,mode=755"
_LOCKED_FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME
_MOST_FILES = 4096


def enter_private_root(readable: Sequence[str], work_bytes: int) -> None:
    """Leave the machine's files behind; needs a mount namespace and its CAP_SYS_ADMIN.

    Args:
        readable: files and directories to show read-only at their own paths; those that do not
            exist are left out.
        work_bytes: size of `WORK_DIRECTORY`, the only place that can be written.

    Raises:
        OSError: the kernel refuses a step.
    """
    os.umask(0o022)
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    _in_memory("", _ROOT_OPTIONS)
    _in_memory(WORK_DIRECTORY, f"size={work_bytes},nr_inodes={_MOST_FILES},mode=1777")
    shown = _outermost(readable)
    # Packages may be installed below it, beside which nothing shall be put either.
    shelves = _shelves(shown)
    for shelf in shelves:
        _in_memory(shelf, _ROOT_OPTIONS)
    for path in shown:
        _show(path)
    for shelf in shelves:
        _seal(shelf)
    for device in _DEVICES:
        _bind(device)
    _seal("")
    pivot_into(_STAGE)


def _in_memory(path: str, options: str) -> None:
    """An empty file system at ``path`` of the new root, which is "" itself."""
    Path(_STAGE + path).mkdir(exist_ok=True)
    mount("tmpfs", _STAGE + path, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _seal(path: str, flags: int = 0) -> None:
    """Make the mount at ``path`` of the new root read-only, not those below it."""
    flags |= MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    mount(None, _STAGE + path, flags=flags)


def _outermost(paths: Sequence[str]) -> list[str]:
    """Existing paths that are not below another one."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths if os.path.lexists(path)}):
        if not any(Path(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _shelves(paths: Sequence[str]) -> list[str]:
    """The directories directly below `WORK_DIRECTORY` that hold ``paths`` deeper down."""
    below = [Path(path) for path in paths if Path(path).is_relative_to(WORK_DIRECTORY)]
    depth = len(Path(WORK_DIRECTORY).parts) + 1
    return sorted({str(Path(*path.parts[:depth])) for path in below if len(path.parts) > depth})


def _show(path: str) -> None:
    if os.path.islink(path) and Path(path).parent == Path("/"):  # /lib -> usr/lib
        os.symlink(os.readlink(path), _STAGE + path)
        return
    _bind(path)
    _seal(path, os.statvfs(path).f_flag & _LOCKED_FLAGS)


def _bind(path: str) -> None:
    target = Path(_STAGE + path)
    if os.path.isdir(path):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(path, str(target), flags=MS_BIND)
