"""``qwen2kit demo`` scaled down to seconds, and the lm-eval task it generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.cli.demo_task import METRICS, TASKS, task_rows, write_tasks
from qwen2kit.data.embedded import Question, generate
from qwen2kit.errors import ConfigError
from tests.run_cli import run_json


def test_rows_hold_the_answer_and_wrong_choices() -> None:
    questions = tuple(generate(0, 60, held_out=True))
    for question, row in zip(questions, task_rows(questions), strict=True):
        assert row["choices"][row["label"]] == row["answer"] == question.answer
        assert 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4
        assert row["question"] == question.messages[-1]["content"]


def test_one_answer_makes_no_choice() -> None:
    same = Question("add", ({"role": "user", "content": "1 + 1?"},), "2")
    with pytest.raises(ConfigError, match=r"eval\.questions"):
        task_rows([same, same])


def test_lm_eval_reads_the_tasks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from qwen2kit_evals.tasks import select_tasks

    rows = task_rows(tuple(generate(1, 12, held_out=True)))
    write_tasks(tmp_path / "tasks", rows)
    selection = select_tasks(TASKS, include_path=tmp_path / "tasks", defaults=False)
    generating, choosing = selection.objects
    for row, document in zip(rows, generating.test_docs(), strict=True):
        assert generating.doc_to_text(document) == row["question"]
        assert generating.doc_to_target(document) == row["answer"]
        assert choosing.doc_to_choice(document) == row["choices"]
        assert choosing.doc_to_target(document) == row["label"]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    if set(installed()) < {"torch", "mlx"}:
        pytest.skip("needs both backends")
    out = tmp_path / "demo"
    document = run_json(
        "demo", "train.steps=3", "data.questions=1000", "eval.questions=12", "--dir", out,
        cold=True,
    )  # fmt: skip
    assert json.loads((out / "demo.json").read_text()) == document
    models = [(row["model"], row["backend"]) for row in document["scores"]]
    assert sorted(models) == [
        ("trained", "mlx"), ("trained", "torch"), ("trained, 4-bit", "mlx"),
        ("untrained", "mlx"), ("untrained", "torch"),
    ]  # fmt: skip
    by_model: dict[str, set[tuple[float, ...]]] = {}
    for row in document["scores"]:
        lm_eval = row.get("lm_eval", {})
        if lm_eval:  # all questions fit, so both ways of scoring must agree
            assert lm_eval[TASKS[0]] == pytest.approx(row["exact_match"])
            assert set(lm_eval) == set(METRICS)
        values = (row["exact_match"], *lm_eval.values())
        by_model.setdefault(row["model"], set()).add(values)
    assert all(len(values) == 1 for values in by_model.values())  # the backends agree
    sizes = {report["out"].rsplit("/")[-1]: report["bytes"] for report in document["conversions"]}
    assert sizes["mlx-4bit"] < sizes["mlx"] / 2
    assert {chat["backend"] for chat in document["chat"]} == {"torch", "mlx"}
