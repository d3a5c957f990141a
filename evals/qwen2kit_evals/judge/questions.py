"""Open questions in JSONL files; the published files of MT-Bench, Arena-Hard and AlignBench fit.

One question a line: ``id`` (``question_id``, ``uid``); ``turns``, what the user says one after the
other (texts, or objects with ``content``), or a single ``prompt`` or ``question``; optionally
``category`` (``cluster``) and ``reference``, a model answer per turn (one text stands for the
first turn).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2kit.errors import DataError

_IDS = ("id", "question_id", "uid")
_CATEGORIES = ("category", "cluster")
_SINGLE = ("prompt", "question")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenQuestion:
    """A conversation to have with the model.

    Attributes:
        name: tells it from the file's others.
        category: for means; empty if the file has none.
        turns: what the user says.
        reference: a good answer per turn, as far as known.
    """

    name: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


def read_questions(path: Path) -> tuple[OpenQuestion, ...]:
    """The questions of a file.

    Raises:
        DataError: the file is absent or empty, or a line is no question.
    """
    questions = []
    for number, row in _rows(path):
        try:
            questions.append(_question(row))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no question: {error}") from error
    _check_names([question.name for question in questions], path)
    return tuple(questions)


def read_answers(path: Path) -> dict[str, tuple[str, ...]]:
    """Another model's answers per question: ``id`` and ``answers``, a text per turn.

    The ``samples.jsonl`` of a run of ours is such a file.

    Raises:
        DataError: the file is absent or empty, or a line holds no answers.
    """
    answers = {}
    names = []
    for number, row in _rows(path):
        try:
            name = str(_first(row, _IDS))
            answers[name] = tuple(_texts(row["answers"]))
            names.append(name)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no answers: {error}") from error
    _check_names(names, path)
    return answers


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object")
        yield number, row


def _question(row: Mapping[str, Any]) -> OpenQuestion:
    turns = _texts(row["turns"]) if "turns" in row else [str(_first(row, _SINGLE))]
    if not turns:
        raise KeyError("turns")
    given = row.get("reference") or []
    return OpenQuestion(
        name=str(_first(row, _IDS)),
        category=str(next((row[key] for key in _CATEGORIES if key in row), "")),
        turns=tuple(turns),
        reference=tuple(_texts([given] if isinstance(given, str) else given)),
    )


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if key in row:
            return row[key]
    raise KeyError(keys[0])


def _texts(items: Sequence[Any]) -> list[str]:
    return [str(item["content"] if isinstance(item, dict) else item) for item in items]


def _check_names(names: Sequence[str], path: Path) -> None:
    if not names:
        raise DataError(f"{path} holds no question")
    if len({*names}) < len(names):
        raise DataError(f"{path} has two lines with one id")
