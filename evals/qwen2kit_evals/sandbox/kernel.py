"""Linux system calls that Python 3.11 has no function for.

Every function raises OSError, with the call's name as its file name, when the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

CLONE_NEW_ANY: Final = 0x7E020000
"""All namespace flags of clone(2)."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def call(name: str, *arguments: object) -> int:
    """libc's function ``name``; integers pass as C ints, None as a null pointer."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(getattr(libc, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def unshare_all(*, user: bool) -> None:
    """New mount, PID (for children), network, IPC and UTS namespaces, and a user namespace if
    ``user`` (needed without CAP_SYS_ADMIN)."""
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    call("unshare", flags | (_CLONE_NEWUSER if user else 0))


def mount(
    source: str | None, target: str, kind: str | None = None, flags: int = 0, options: str = ""
) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), options.encode())


def pivot_into(root: str) -> None:
    """Make the mount point ``root`` the root of this mount namespace and let go of the old one."""
    os.chdir(root)
    call("syscall", ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b".")
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def die_with_parent(parent: int) -> None:
    """Be killed when the process ``parent``, which started this one, ends.

    ``parent`` is 0 if it is outside this process's PID namespace.
    """
    call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def drop_capabilities() -> None:
    """Give up every capability, for this process and whatever it executes."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        try:
            call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:  # unknown to this kernel, or never held
            continue
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
