"""Multilingual exams: prompts and options of M3Exam and IndoMMLU."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

_LABEL = re.compile(r"\s*[(（]?([^\W_])[)）.．、:]")


def without_images(dataset: Any) -> Any:
    """M3Exam rows that need no image and whose answer is one of their options."""
    return dataset.filter(
        lambda row: row.get("need_image", "no") == "no" and row["answer_text"] in m3exam_labels(row)
    )


def m3exam_prompt(doc: Mapping[str, Any]) -> str:
    """Background paragraphs, question, options as printed, "Answer:"."""
    background = doc["background_description"] or []
    paragraphs = [background] if isinstance(background, str) else list(background)
    return "\n".join([*paragraphs, doc["question_text"], *doc["options"], "Answer:"])


def m3exam_labels(doc: Mapping[str, Any]) -> list[str]:
    """The labels of the options: "2" of "(2) ...", "B" of "B. ..."; counted where unlabelled."""
    found = [_LABEL.match(option) for option in doc["options"]]
    return [match[1] if match else str(i) for i, match in enumerate(found, 1)]


def m3exam_answer(doc: Mapping[str, Any]) -> int:
    """Index of the right option."""
    return m3exam_labels(doc).index(doc["answer_text"])


def indommlu_questions(dataset: Any) -> Any:
    """IndoMMLU's test rows, with ``letters`` (A to E) and ``options`` one per line."""
    return dataset.filter(lambda row: not _is_shot(row)).map(_with_letters)


def indommlu_shots(dataset: Any) -> Any:
    """The rows marked as examples, prepared alike."""
    return dataset.filter(_is_shot).map(_with_letters)


def _is_shot(row: Mapping[str, Any]) -> bool:
    return str(row["is_for_fewshot"]).lower() in {"1", "1.0", "true"}


def _with_letters(row: Mapping[str, Any]) -> dict[str, Any]:
    given = row["options"].strip()
    options = ast.literal_eval(given) if given.startswith("[") else given.splitlines()
    kept = [option.strip() for option in options if option.strip()]
    letters = [chr(ord("A") + i) for i in range(len(kept))]
    return {"options": "\n".join(kept), "letters": letters, "answer": row["answer"].strip().upper()}
