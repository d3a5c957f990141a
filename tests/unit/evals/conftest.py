"""A tiny checkpoint and tiny tasks, shared by the evaluation tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval_tasks import write_tasks
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in Hugging Face layout with a context of 256 tokens."""
    path = tmp_path_factory.mktemp("eval") / "tiny"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task files of `tests.eval_tasks`."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True, scope="session")
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    config = pytest.importorskip("datasets.config")
    pytest.importorskip("lm_eval")
    before = config.HF_DATASETS_CACHE
    config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    yield
    config.HF_DATASETS_CACHE = before
