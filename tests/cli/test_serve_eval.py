"""lm-eval's own API models against a running server give the scores of a direct evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.registry import installed
from tests.eval_tasks import TASK_NAMES, write_tasks
from tests.serving import Server
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

pytest.importorskip("fastapi")
pytest.importorskip("transformers")
pytest.importorskip("tenacity")
api = pytest.importorskip("lm_eval.models.openai_completions")

from qwen2kit.backend.loading import LoadedModel, load_model  # noqa: E402
from qwen2kit.backend.plan import ExecutionPlan  # noqa: E402
from qwen2kit_evals.compare import compare_samples  # noqa: E402
from qwen2kit_evals.results import sample_rows  # noqa: E402
from qwen2kit_evals.run import evaluate, run_tasks  # noqa: E402
from qwen2kit_evals.tasks import TaskSelection, select_tasks  # noqa: E402

pytestmark = pytest.mark.slow

POSITIONS = 2048
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not installed():
        pytest.skip("no backend installed")
    path = tmp_path_factory.mktemp("served") / "tiny"
    write_tiny_checkpoint(
        path, seed=3, vocab_size=VOCAB, bos_token_id=None, max_position_embeddings=POSITIONS
    )
    return path


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskSelection]:
    config = pytest.importorskip("datasets.config")
    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    files = write_tasks(tmp_path_factory.mktemp("tasks"))
    yield select_tasks(TASK_NAMES, include_path=files, defaults=False)
    config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(model_dir, plan=ExecutionPlan(dtype="float32"))


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir, "--dtype", "float32", "--slots", "8") as running:
        yield running


def _options(server: Server, path: str, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "base_url": f"{server.url}/v1/{path}", "model": "tiny", "max_length": POSITIONS,
        "tokenizer": str(loaded.checkpoint.path), "max_retries": 1,
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4])
def test_local_completions(
    server: Server, loaded: LoadedModel, selection: TaskSelection, batch_size: int
) -> None:
    model = api.LocalCompletionsAPI(
        **_options(server, "completions", loaded),
        tokenizer_backend="huggingface",
        custom_prefix_token_id=loaded.tokenizer.eot_id,
        batch_size=batch_size,
    )
    report = run_tasks(model, selection)
    direct = evaluate(loaded, selection).samples
    for task in TASK_NAMES:
        agreement = compare_samples(sample_rows(report["samples"][task]), direct[task])
        assert agreement.max_dlogp <= TOLERANCE, f"{task}: {agreement}"
        assert agreement.same_answers, f"{task}: {agreement}"
        assert agreement.greedy_differ == 0, f"{task}: {agreement}"
        assert agreement.metrics_differ == 0, f"{task}: {agreement}"
    assert report["results"].keys() == set(TASK_NAMES)


def test_local_chat_completions(
    server: Server, loaded: LoadedModel, selection: TaskSelection
) -> None:
    model = api.LocalChatCompletion(**_options(server, "chat/completions", loaded))
    only = replace(
        selection,
        objects=tuple(t for t in selection.objects if t.config.task == "tiny_generate"),
    )
    report = run_tasks(model, only, apply_chat_template=True)
    direct = evaluate(loaded, only, apply_chat_template=True).samples["tiny_generate"]
    served = sample_rows(report["samples"]["tiny_generate"])
    for name in ("responses", "filtered", "metrics"):
        assert [row[name] for row in served] == [row[name] for row in direct]
    assert any(text for row in direct for (text,) in row["responses"])
