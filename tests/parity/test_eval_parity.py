"""Our lm-eval adapter against lm-eval's own ``hf`` model: the same numbers, sample by sample."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.loading import LoadedModel, load_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.errors import ParityError
from qwen2kit.weights.convert import convert
from tests.eval_tasks import TASK_NAMES, write_tasks
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint
from tests.unit.evals.reference_lm import load_reference

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

from qwen2kit_evals.compare import Agreement, compare_samples  # noqa: E402
from qwen2kit_evals.results import sample_rows  # noqa: E402
from qwen2kit_evals.run import evaluate, run_tasks  # noqa: E402
from qwen2kit_evals.tasks import TaskSelection, select_tasks  # noqa: E402

BACKENDS = ("reference", "torch", "mlx")
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=["untied", "tied"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("parity") / str(request.param)
    write_tiny(path, seed=3, tied=request.param == "tied")
    return path


def write_tiny(path: Path, *, seed: int, tied: bool) -> None:
    """No padding rows in the vocabulary: transformers would generate them, we never do."""
    write_tiny_checkpoint(path, seed=seed, tied=tied, vocab_size=VOCAB, bos_token_id=None)


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskSelection]:
    config = pytest.importorskip("datasets.config")
    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    files = write_tasks(tmp_path_factory.mktemp("tasks"))
    yield select_tasks(TASK_NAMES, include_path=files, defaults=False)
    config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def theirs(tiny: Path, selection: TaskSelection) -> dict[str, list[dict[str, Any]]]:
    """The hf model's log. One prompt at a time: its padding moves near ties."""
    return hf_samples(tiny, selection)


def hf_samples(
    path: Path, selection: TaskSelection, **options: Any
) -> dict[str, list[dict[str, Any]]]:
    eot = load_tokenizer(path).eot_id
    model = huggingface.HFLM(
        str(path), device="cpu", dtype="float32", batch_size=1, prefix_token_id=eot
    )
    report = run_tasks(model, selection, **options)
    return {task: sample_rows(rows) for task, rows in report["samples"].items()}


def load_tokenizer(path: Path) -> Any:
    from qwen2kit.weights.checkpoint import open_checkpoint

    return open_checkpoint(path).tokenizer()


def load(path: Path, backend: str) -> LoadedModel:
    if backend == "reference":
        return load_reference(path)
    pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}[backend])
    return load_model(path, backend=backend, plan=ExecutionPlan(dtype="float32", device="cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_equals_the_hf_model(
    tiny: Path, selection: TaskSelection, theirs: dict[str, Any], backend: str
) -> None:
    if backend == "reference" and tiny.name == "untied":
        pytest.skip("slow; the tied model covers the adapter")
    ours = evaluate(load(tiny, backend), selection, batch_size=3).samples
    for task in TASK_NAMES:
        agreement = compare_samples(ours[task], theirs[task])
        assert_equal(task, agreement)
    assert compare_samples(ours["tiny_choice"], theirs["tiny_choice"]).logprobs == 32
    assert compare_samples(ours["tiny_rolling"], theirs["tiny_rolling"]).logprobs == 4
    assert compare_samples(ours["tiny_generate"], theirs["tiny_generate"]).generations == 8


def assert_equal(task: str, agreement: Agreement, tolerance: float = TOLERANCE) -> None:
    assert agreement.max_dlogp <= tolerance, f"{task}: {agreement}"
    assert agreement.same_answers, f"{task}: {agreement}"
    assert agreement.greedy_differ == 0, f"{task}: {agreement}"
    assert agreement.metrics_differ == 0, f"{task}: {agreement}"


def test_chat_templates_give_the_same_prompts_and_scores(
    tiny: Path, selection: TaskSelection
) -> None:
    options: dict[str, Any] = {"limit": 2, "apply_chat_template": True}
    theirs = hf_samples(tiny, selection, **options)
    ours = evaluate(load(tiny, "torch"), selection, **options).samples
    for task in ("tiny_choice", "tiny_generate"):
        assert_equal(task, compare_samples(ours[task], theirs[task]))


def test_a_different_model_is_noticed(
    tmp_path: Path, tiny: Path, selection: TaskSelection, theirs: dict[str, Any]
) -> None:
    write_tiny(tmp_path / "other", seed=4, tied=tiny.name == "tied")
    other = evaluate(load(tmp_path / "other", "torch"), selection, limit=3).samples
    agreement = compare_samples(other["tiny_choice"], theirs["tiny_choice"][:3])
    assert agreement.max_dlogp > 0.1
    with pytest.raises(ParityError, match="do not compare"):
        compare_samples(other["tiny_choice"], theirs["tiny_choice"])
    with pytest.raises(ParityError, match="arguments differs"):
        compare_samples(other["tiny_choice"][:2], theirs["tiny_empty"])


@pytest.mark.real_model
@pytest.mark.slow
def test_real_model_on_real_benchmarks(real_gguf: Path, datasets_dir: Path, tmp_path: Path) -> None:
    """One document of each task; the whole claim is measured by benchmarks/eval_parity.py."""
    from qwen2kit.weights.checkpoint import open_checkpoint

    path = tmp_path / "hf"
    convert(open_checkpoint(real_gguf), path, to="hf", dtype="float32")
    names = ["mmlu_astronomy", "arc_challenge", "gsm8k"]
    selection = select_tasks(names, datasets=datasets_dir, num_fewshot=0)
    for task in selection.objects:
        if task.config.output_type == "generate_until":
            task.config.generation_kwargs["max_gen_toks"] = 8
    theirs = hf_samples(path, selection, limit=1)
    gc.collect()
    for backend in ("torch", "mlx"):
        ours = evaluate(load(path, backend), selection, limit=1).samples
        for name in names:
            assert_equal(f"{backend} {name}", compare_samples(ours[name], theirs[name]))
        gc.collect()
