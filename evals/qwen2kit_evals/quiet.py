"""Keep lm-eval's routine output off the terminal; results.json records what matters of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Inside, lm-eval logs errors only, and collects no report of git and PyTorch.

    That report starts subprocesses which complain outside a git checkout; `provenance` holds ours.
    """
    import lm_eval.evaluator as evaluator

    skipped: dict[str, Any] = {
        "get_git_commit_hash": lambda: None,
        "add_env_info": lambda storage: None,
    }
    before = {name: getattr(evaluator, name) for name in skipped}
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    for name, replacement in skipped.items():
        setattr(evaluator, name, replacement)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, original in before.items():
            setattr(evaluator, name, original)
