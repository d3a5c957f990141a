"""Python's collector of garbage, set for a server.

Every step makes thousands of small objects and drops them again. Left as it is, the collector looks
through the young ones several times a step, and every few seconds through all there are, tokenizer
and libraries among them: 80 ms in which no stream moves.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_YOUNG: Final = 20_000


@contextmanager
def seldom() -> Iterator[None]:
    """What exists by now is never looked through again, the rest after more objects than usual."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
