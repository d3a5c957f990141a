"""Files that are complete or absent: written beside their place, on disk, and only then named.

A full disk or a crash never leaves a file that looks finished, only a hidden ``.NAME.partial``.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

SUFFIX: Final = ".partial"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PartialFile:
    """A binary file under construction: write to `file`, then `finish` and `publish`.

    Args:
        path: its final name; what is there stays until `publish`.

    Attributes:
        file: open for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hidden = path.with_name(f".{path.name}{SUFFIX}")
        self.file = self._hidden.open("wb")

    def finish(self) -> None:
        """Flush everything to disk and close; raises OSError if the disk is full."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def publish(self) -> None:
        """Give the finished file its name; `sync_directory` makes that durable."""
        self._hidden.replace(self.path)

    def discard(self) -> None:
        """Remove what is not published."""
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()
        self._hidden.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether nothing more can be written: the disk, the user's quota or a limit is full."""
    return error.errno in _FULL


def reason_of(error: OSError) -> str:
    """Why a file could not be written, in words that may stand within a sentence."""
    return "no space left on the disk" if is_full(error) else error.strerror or str(error)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` so that ``path`` holds either the old or the whole new content."""
    partial = PartialFile(path)
    try:
        partial.file.write(text.encode())
        partial.finish()
        partial.publish()
    except BaseException:
        partial.discard()
        raise


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable (a no-op where directories cannot be opened)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
