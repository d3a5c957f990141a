"""The tiny model of the serving tests; skips where serving is not installed."""

from __future__ import annotations

import pytest

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.registry import installed

pytest.importorskip("fastapi")
pytest.importorskip("httpx")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    if not installed():
        pytest.skip("no backend installed")
    from tests.unit.serve.in_process import tiny_model

    return tiny_model(tmp_path_factory.mktemp("served"))
