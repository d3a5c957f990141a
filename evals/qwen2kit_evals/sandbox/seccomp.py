"""A system-call filter (seccomp-bpf) for sandboxed programs: no sockets, no way to other processes.

Refused calls fail with EPERM, so a program sees an ordinary exception. Pairs of connected sockets
(which asyncio needs) stay allowed: they lead nowhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from typing import Final

from qwen2kit_evals.sandbox.kernel import CLONE_NEW_ANY, call

# Numbers on x86_64 and aarch64 (Linux: syscall_64.tbl, asm-generic/unistd.h); None: no such call.
_CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_ALONE: Final[dict[str, tuple[int | None, int | None]]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_TGKILL: Final = (234, 131)
_PRLIMIT: Final = (302, 261)

_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32_BIT: Final = 0x40000000
_CLONE_THREAD: Final = 0x10000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0 = 0, 4, 16
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _FILTER_MODE = 22, 2


def available() -> bool:
    """Whether the filter knows this processor's system calls."""
    return platform.system() == "Linux" and platform.machine() in _MACHINES


def install(*, alone: bool) -> None:
    """Filter this process and its children from now on; needs no_new_privs.

    Args:
        alone: also no new processes, and no signals to any other process: for where no PID
            namespace keeps them together.

    Raises:
        OSError: the kernel refuses.
    """
    code = b"".join(_program(alone=alone))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    call("prctl", _PR_SET_SECCOMP, _FILTER_MODE, ctypes.c_char_p(header), 0, 0)


def _program(*, alone: bool) -> Iterator[bytes]:
    column, architecture = _MACHINES[platform.machine()]
    yield _op(_LOAD, _ARCHITECTURE)
    yield _op(_EQUAL, architecture, 1, 0)
    yield _refuse()
    yield _op(_LOAD, _NUMBER)
    if column == 0:
        yield _op(_AT_LEAST, _X32_BIT, 0, 1)
        yield _refuse()
    for numbers in (_CALLS | (_ALONE if alone else {})).values():
        if (number := numbers[column]) is not None:
            yield _op(_EQUAL, number, 0, 1)
            yield _refuse()
    yield _op(_EQUAL, _CLONE3[column], 0, 1)  # its flags are out of reach; libc then uses clone
    yield _refuse(errno.ENOSYS)
    yield from _refuse_if(_CLONE[column], _op(_ANY_BIT, CLONE_NEW_ANY, 0, 1))
    if alone:
        yield from _refuse_if(_CLONE[column], _op(_ANY_BIT, _CLONE_THREAD, 1, 0))
        yield from _refuse_if(_TGKILL[column], _op(_EQUAL, os.getpid(), 1, 0))
        yield from _refuse_if(_PRLIMIT[column], _op(_EQUAL, 0, 1, 0))
    yield _op(_RETURN, _ALLOW)


def _refuse_if(number: int, condition: bytes) -> Iterator[bytes]:
    """Refuse call ``number`` if ``condition``, a jump on its first argument, falls through."""
    yield _op(_EQUAL, number, 0, 4)
    yield _op(_LOAD, _ARGUMENT_0)
    yield condition
    yield _refuse()
    yield _op(_LOAD, _NUMBER)


def _refuse(number: int = errno.EPERM) -> bytes:
    return _op(_RETURN, _ERRNO | number)


def _op(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)
