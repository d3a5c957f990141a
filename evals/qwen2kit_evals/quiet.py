"""Keep lm-eval's log of routine settings (results.json records them) off the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Inside, lm-eval logs errors only."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
