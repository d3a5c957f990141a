"""The embedded held-out questions as two lm-eval tasks: data file and task files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.data.embedded import Question

TASKS = ("qwen2kit_embedded_generate", "qwen2kit_embedded_choice")
METRICS = {TASKS[0]: "exact_match", TASKS[1]: "acc"}
_CHOICES = 4


def task_rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """One document per question: the question, its answer, and up to three wrong choices, which
    are answers to other questions (of the same kind where it has any).

    Raises:
        ConfigError: all questions have the same answer.
    """
    return [_row(index, question, questions) for index, question in enumerate(questions)]


def write_tasks(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``questions.jsonl`` and one YAML file per task (JSON is YAML) into ``directory``.

    The first task generates the answer; the second picks it among the choices by their
    log-probability.
    """
    directory.mkdir(parents=True)
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str((directory / "cache").resolve()),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    generate: dict[str, Any] = {
        "task": TASKS[0],
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
    }
    choice: dict[str, Any] = {
        "task": TASKS[1],
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    }
    for task in (generate, choice):
        metric = {"metric": METRICS[task["task"]], "aggregation": "mean", "higher_is_better": True}
        document = common | task | {"metric_list": [metric]}
        path = directory / f"{task['task']}.yaml"
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _row(index: int, question: Question, questions: Sequence[Question]) -> dict[str, Any]:
    others = _other_answers(question, [q for q in questions if q.kind == question.kind])
    others = others or _other_answers(question, questions)
    if not others:
        raise ConfigError("the held-out questions all have the same answer: raise eval.questions")
    count = min(_CHOICES - 1, len(others))
    choices = sorted([question.answer, *(others[(index + i) % len(others)] for i in range(count))])
    return {
        "question": question.messages[-1]["content"],
        "answer": question.answer,
        "choices": choices,
        "label": choices.index(question.answer),
    }


def _other_answers(question: Question, questions: Sequence[Question]) -> list[str]:
    return sorted({q.answer for q in questions} - {question.answer})
