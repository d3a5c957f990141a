"""Processes that end when the one that started them is gone, even by SIGKILL.

The kernel sends the signal where it can (Linux); elsewhere a thread looks now and then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Final

PARENT: Final = "QWEN2KIT_PARENT"
"""Environment variable: process id of the parent that a child must not outlive."""

_PR_SET_PDEATHSIG: Final = 1
_LOOK_SECONDS: Final = 1.0


def parent_here() -> Mapping[str, str]:
    """What a child needs in its environment for its `follow_parent` to mean this process."""
    return {PARENT: str(os.getpid())}


def follow_parent() -> None:
    """From now on this process gets SIGTERM when its parent is gone; nothing happens if the parent
    did not ask for that (`parent_here`). To be called in the main thread. Children of this process
    are not concerned."""
    named = os.environ.pop(PARENT, None)
    if named is None:
        return
    parent = int(named)
    if not _ask_kernel():
        threading.Thread(target=_look, args=(parent,), name="lifeline", daemon=True).start()
    if os.getppid() != parent:  # it was gone before we could ask
        os.kill(os.getpid(), signal.SIGTERM)


def _ask_kernel() -> bool:
    """Whether the kernel (Linux's ``prctl(2)``) will send the signal."""
    if not sys.platform.startswith("linux"):
        return False
    from ctypes import CDLL

    try:
        return bool(CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
