"""Some of lm-eval's tasks download NLTK data when they are built; offline they must not try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from qwen2kit.errors import DataError

_TASKS = ("ifeval", "nerel", "niah")


@contextmanager
def no_nltk_download(entry: Any, *, offline: bool) -> Iterator[None]:
    """Inside, building ``entry`` says what it lacks instead of fetching it, if ``offline``.

    Without the data such a task would only fail when it scores its first sentence. NLTK takes a
    second to import, hence only for the tasks that use it.

    Args:
        entry: of lm-eval's task index.

    Raises:
        DataError: the task wants to download something.
    """
    uses_nltk = any(name in str(entry.yaml_path) for name in _TASKS)
    if not offline or not uses_nltk or find_spec("nltk") is None:
        yield
        return
    import nltk  # type: ignore[import-untyped]

    def refuse(package: str, *args: object, **options: object) -> None:
        raise DataError(
            f"task {entry.name} needs NLTK's {package}; fetch it where there is a network: "
            f"python -m nltk.downloader {package}"
        )

    original = nltk.download
    nltk.download = refuse
    try:
        yield
    finally:
        nltk.download = original
