"""Keep lm-eval's routine output off the terminal; results.json records what matters of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Inside, lm-eval logs errors only, draws no bar for each task whose prompts it builds, and
    collects no report of git and PyTorch.

    That report starts subprocesses which complain outside a git checkout; `provenance` holds ours.
    """
    import lm_eval.api.task as task
    import lm_eval.evaluator as evaluator

    replaced: list[tuple[Any, str, Any]] = [
        (evaluator, "get_git_commit_hash", lambda: None),
        (evaluator, "add_env_info", lambda storage: None),
        (task, "tqdm", lambda items, **options: items),
    ]
    before = [getattr(module, name) for module, name, _ in replaced]
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    for module, name, replacement in replaced:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        log.setLevel(level)
        for (module, name, _), original in zip(replaced, before, strict=True):
            setattr(module, name, original)
