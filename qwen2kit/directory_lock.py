"""One writer of a directory at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen2kit.errors import Qwen2KitError


@contextmanager
def locked(directory: Path, refusal: Qwen2KitError) -> Iterator[None]:
    """Keep ``directory``, which exists, to this process while entered, however it ends.

    File systems without locks let everybody in.

    Raises:
        Qwen2KitError: ``refusal``, if another process has it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal from None
        yield
    finally:
        os.close(descriptor)
