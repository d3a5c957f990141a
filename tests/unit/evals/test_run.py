"""A whole evaluation on the reference model: rows, files, provenance, notices."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qwen2kit.errors import ConfigError, TokenizerError
from qwen2kit_evals.failed_tasks import TasksFailed
from qwen2kit_evals.metric_rows import metric_rows
from qwen2kit_evals.provenance import file_digests
from qwen2kit_evals.results import EvalResult, default_output, plain, write_results
from qwen2kit_evals.run import evaluate
from qwen2kit_evals.suite_tasks import SuiteSelection
from qwen2kit_evals.suites import SuiteTask
from qwen2kit_evals.tasks import TaskSelection, select_tasks
from tests.eval_tasks import write_tasks
from tests.unit.evals.reference_lm import load_reference


@pytest.fixture(scope="module")
def selection(task_files: Path) -> TaskSelection:
    names = ["tiny_choice", "tiny_long", "tiny_generate"]
    return select_tasks(names, include_path=task_files, defaults=False)


@pytest.fixture(scope="module")
def result(
    tiny: Path, selection: TaskSelection, tmp_path_factory: pytest.TempPathFactory
) -> EvalResult:
    output = tmp_path_factory.mktemp("results") / "run"
    return evaluate(load_reference(tiny), selection, limit=3, seed=7, output=output)


def test_scores_follow_from_the_logged_samples(result: EvalResult) -> None:
    samples = result.samples["tiny_choice"]
    correct = 0
    for sample in samples:
        scores = [response[0][0] for response in sample["responses"]]
        correct += int(np.argmax(scores)) == sample["target"]
    assert result.value("tiny_choice", "acc") == pytest.approx(correct / 3)
    with pytest.raises(KeyError, match="bleu"):
        result.value("tiny_choice", "bleu")
    [row] = [r for r in result.rows if (r.task, r.metric) == ("tiny_choice", "acc")]
    assert (row.samples, row.shots, row.filter, row.group) == (3, 2, "none", False)


def test_files_repeat_the_result(result: EvalResult) -> None:
    assert result.output is not None
    document = json.loads((result.output / "results.json").read_text())
    assert document == plain(result.document())
    evaluation = document["provenance"]["evaluation"]
    assert set(evaluation["seeds"].values()) == {7}
    assert evaluation["task_versions"]["tiny_choice"] == 1.0
    model = document["provenance"]["model"]
    assert (model["backend"], model["dtype"], model["device"]) == ("reference", "float32", "cpu")
    assert {"lm_eval", "qwen2kit", "numpy"} <= set(model["versions"])
    for task, samples in result.samples.items():
        lines = (result.output / f"samples_{task}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == plain(samples)
    assert {path.name for path in result.output.parent.iterdir()} == {result.output.name}


def test_truncation_is_reported(result: EvalResult) -> None:
    assert any("lost their beginning" in notice for notice in result.notices)
    assert result.provenance["evaluation"]["truncated_requests"] == 12


def test_table_shows_every_row(result: EvalResult) -> None:
    assert result.table().row_count == len(result.rows)


def test_bad_values_are_refused_before_running(
    tiny: Path, selection: TaskSelection, tmp_path: Path
) -> None:
    loaded = load_reference(tiny)
    for limit in (0, -1, 2.5, math.nan):
        with pytest.raises(ConfigError, match="limit must be"):
            evaluate(loaded, selection, limit=limit)
    with pytest.raises(ConfigError, match="batch_size"):
        evaluate(loaded, selection, batch_size=0)
    with pytest.raises(ConfigError, match="belong to select_tasks"):
        evaluate(loaded, selection, num_fewshot=1)
    (tmp_path / "full").write_text("x")
    with pytest.raises(ConfigError, match="already exists"):
        evaluate(loaded, selection, output=tmp_path / "full")
    loaded.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        evaluate(loaded, selection, apply_chat_template=True)


def test_chat_template_wraps_the_prompts(tiny: Path, task_files: Path) -> None:
    selection = select_tasks(["tiny_generate"], include_path=task_files, defaults=False)
    result = evaluate(load_reference(tiny), selection, limit=1, apply_chat_template=True)
    prompt = result.samples["tiny_generate"][0]["arguments"][0][0]
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count("<|im_start|>user") == 2
    assert result.output is None


def test_a_failed_write_leaves_nothing(
    result: EvalResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_results(result, tmp_path / "new" / "run")
    assert list((tmp_path / "new").iterdir()) == []


def test_groups_precede_their_members() -> None:
    report = {
        "results": {
            "g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "a": {"alias": " - a", "acc,none": 1.0, "acc_stderr,none": 0.1, "sample_len": 4},
            "b": {"alias": "b", "exact_match,strict": float("nan"), "sample_len": 2},
        },
        "group_subtasks": {"g": ["a"], "a": [], "b": []},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "n-shot": {"a": 5, "b": 0},
    }
    rows = metric_rows(report)
    assert [(r.task, r.depth, r.group) for r in rows] == [
        ("g", 0, True),
        ("a", 1, False),
        ("b", 0, False),
    ]
    assert [(r.value, r.stderr, r.samples, r.shots) for r in rows] == [
        (0.5, None, None, None),
        (1.0, 0.1, 4, 5),
        (None, None, 2, 0),
    ]
    assert rows[2].filter == "strict"


def test_plain_is_strict_json() -> None:
    value = {"a": np.float32(0.5), 1: (float("inf"), None, True), "p": Path("x"), "s": {"y"}}
    expected = {"a": 0.5, "1": [None, None, True], "p": "x", "s": ["y"]}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected


def test_digests_tell_weights_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    blob = bytearray(8 << 20)
    path.write_bytes(blob)
    first = file_digests(path)
    blob[-1] = 1
    path.write_bytes(blob)
    assert file_digests(path) != first
    assert first["model.safetensors"]["bytes"] == 8 << 20


def test_default_output_is_named_after_the_model() -> None:
    assert default_output("org/My Model.gguf").name.startswith("My-Model.gguf-2")
    assert default_output("..").name.startswith("model-")


LONG = {"tiny_generate": {"generation_kwargs": {"until": ["x"], "max_gen_toks": 256}}}


def test_a_task_that_does_not_fit_the_context_fails_alone(tiny: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", **LONG)
    names = ["tiny_generate", "tiny_choice", "tiny_long"]
    chosen = select_tasks(names, include_path=tmp_path / "tasks", defaults=False)
    loaded = load_reference(tiny)
    result = evaluate(loaded, chosen, limit=2, output=tmp_path / "run")
    (failed,) = result.failed
    assert failed.task == "tiny_generate"
    assert failed.reason.startswith("256 tokens to generate leave no room for a prompt")
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert document["failed"] == [asdict(failed)]
    assert not (tmp_path / "run" / "samples_tiny_generate.jsonl").exists()
    table = Console(file=io.StringIO(), width=200)
    table.print(result.table())
    assert "failed: 256 tokens" in table.file.getvalue()  # type: ignore[attr-defined]
    rest = select_tasks(names[1:], include_path=tmp_path / "tasks", defaults=False)
    alone = evaluate(loaded, rest, limit=2)
    assert result.rows == alone.rows
    assert result.samples == alone.samples
    assert result.notices == alone.notices
    assert alone.failed == ()


def test_a_run_of_failing_tasks_alone_is_an_error(tiny: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", **LONG)
    chosen = select_tasks(["tiny_generate"], include_path=tmp_path / "tasks", defaults=False)
    with pytest.raises(TasksFailed, match="task tiny_generate: 256 tokens to generate leave no"):
        evaluate(load_reference(tiny), chosen, limit=2)


def test_a_benchmark_of_a_suite_fails_as_a_whole_and_the_others_go_on(
    tiny: Path, tmp_path: Path
) -> None:
    write_tasks(tmp_path / "tasks", **LONG)
    common = {"metric": "acc", "prompt": "", "parser": "", "data": (), "shots": 0}
    benchmarks = [
        (SuiteTask(benchmark=name.upper(), run=name, **common), name.split("+"))  # type: ignore[arg-type]
        for name in ("tiny_choice", "tiny_long+tiny_generate", "tiny_long")
    ]
    selections = tuple(
        select_tasks(names, include_path=tmp_path / "tasks", defaults=False)
        for _, names in benchmarks
    )
    tasks = tuple(
        (task, selection) for (task, _), selection in zip(benchmarks, selections, strict=True)
    )
    suite = SuiteSelection(suite="mine", tasks=tasks, selections=selections, num_fewshot=None)
    result = evaluate(load_reference(tiny), suite, limit=2, output=tmp_path / "run")
    whole, broken, last = result.benchmarks
    assert broken.value is None
    assert broken.absent.startswith("failed: task tiny_generate: 256 tokens to generate leave")
    assert None not in (whole.value, last.value)
    assert [task.task for task in result.failed] == ["tiny_long, tiny_generate"]
    assert {row.task for row in result.rows} == {"tiny_choice", "tiny_long"}


def test_a_group_with_a_failing_member_fails(tiny: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", **LONG)
    group = {"group": "both", "task": ["tiny_choice", "tiny_generate"]}
    (tmp_path / "tasks" / "both.yaml").write_text(json.dumps(group))
    names = ["both", "tiny_long"]
    chosen = select_tasks(names, include_path=tmp_path / "tasks", defaults=False)
    result = evaluate(load_reference(tiny), chosen, limit=2)
    (failed,) = result.failed
    assert failed.task == "both"
    assert failed.reason.startswith("tiny_generate: 256 tokens to generate")
    assert {row.task for row in result.rows} == {"tiny_long"}
