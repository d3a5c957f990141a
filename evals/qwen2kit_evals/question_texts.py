"""The text of test questions, as the contamination check looks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lm_eval.api.group import Group

from qwen2kit_evals.tasks import TaskSelection


def question_texts(selection: TaskSelection) -> dict[str, list[str]]:
    """Per task, the question and its answer for every document lm-eval would score, in order."""
    return {
        task.config.task: [_text(task, doc) for doc in task.eval_docs]
        for chosen in selection.objects
        for task in _leaves(chosen)
    }


def _leaves(chosen: Any) -> Iterator[Any]:
    if isinstance(chosen, Group):
        for child in chosen:
            yield from _leaves(child)
    else:
        yield chosen


def _text(task: Any, doc: Mapping[str, Any]) -> str:
    question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
    if isinstance(question, int) and choices:  # WinoGrande: the choices are the contexts
        question = choices[question]
    if isinstance(answer, int) and choices:
        answer = choices[answer] if 0 <= answer < len(choices) else ""
    answers = answer if isinstance(answer, list) else [answer]
    return " ".join([str(question), *(text for text in answers if isinstance(text, str))])
