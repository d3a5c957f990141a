"""A failing disk is one line on the command line, file named or not."""

from __future__ import annotations

import errno
import os

import pytest

from qwen2kit.cli.disk_errors import explain


@pytest.mark.parametrize(
    ("number", "filename", "says", "code"),
    [
        (errno.ENOSPC, None, "no space left on device while writing output", 11),
        (errno.EDQUOT, None, "no space left on device while writing output", 11),
        (errno.EFBIG, "a.txt", "no space left on device while writing a.txt", 11),
        (errno.EROFS, None, "Read-only file system while reading or writing a file", 10),
        (errno.EACCES, "a.txt", "Permission denied: a.txt", 10),
    ],
)
def test_one_line(number: int, filename: str | None, says: str, code: int) -> None:
    assert explain(OSError(number, os.strerror(number), filename)) == (says, code)


def test_what_is_of_no_disk_stays_a_bug() -> None:
    assert explain(OSError(errno.ECONNREFUSED, "refused")) is None
    assert explain(OSError("nothing known")) is None
