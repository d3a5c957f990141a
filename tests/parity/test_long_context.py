"""Needles and perplexity by context length: both backends give the reference's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2kit.backend.loading import LoadedModel, load_model
from qwen2kit.backend.plan import ExecutionPlan
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.evals.reference_lm import load_reference

pytest.importorskip("lm_eval")

from qwen2kit_evals.context_perplexity import context_perplexity
from qwen2kit_evals.needle import Haystack, grid, run_needles
from qwen2kit_evals.request_log import RequestLog

TEXT = "The cat sat on the mat. Did the dog run? It ran and ran! One two three. " * 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "tiny"
    write_tiny_checkpoint(path, max_position_embeddings=1024)
    (path / "essay.txt").write_text(TEXT)
    return path


@pytest.fixture(params=["torch", "mlx"])
def loaded(request: pytest.FixtureRequest, tiny: Path) -> LoadedModel:
    pytest.importorskip(request.param)
    plan = ExecutionPlan(dtype="float32", device="cpu" if request.param == "torch" else "auto")
    return load_model(tiny, backend=request.param, plan=plan)


@pytest.fixture(scope="module")
def reference_answer(tiny: Path) -> str:
    return answers(load_reference(tiny), 1)[0]


def answers(model: LoadedModel, cells: int) -> list[str]:
    """To the first cells of a small grid."""
    haystack = Haystack(model.checkpoint.path / "essay.txt", model.tokenizer)
    with RequestLog() as log:
        rows = run_needles(
            model, haystack, grid([400, 500], [0, 60])[:cells], chat=False, seed=2,
            batch_size=cells, log=log,
        )  # fmt: skip
    return [row.answer for row in rows]


def test_needles_get_the_reference_answers(loaded: LoadedModel, reference_answer: str) -> None:
    found = answers(loaded, 4)
    assert found[0] == reference_answer
    assert len({*found}) > 1


def test_perplexities_are_the_reference_ones(loaded: LoadedModel, tiny: Path) -> None:
    def nlls(model: LoadedModel) -> list[float]:
        with RequestLog() as log:
            points = context_perplexity(model, TEXT, [32, 128], blocks=4, answers=log)
        return [point.nll for point in points]

    assert nlls(loaded) == pytest.approx(nlls(load_reference(tiny)), abs=1e-4)
