"""Grading of TheoremQA: booleans, options, numbers and lists of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

TOLERANCE = 0.01
"""Largest relative error of a number."""

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+\.?\d*)?")
_YES_NO = {"true": "true", "yes": "true", "correct": "true"} | dict.fromkeys(
    ("false", "no", "incorrect"), "false"
)


def without_pictures(dataset: Any) -> Any:
    """The rows (``Question``, ``Answer``, ``Answer_type``) that show no picture."""
    if "Picture" not in dataset.column_names:
        return dataset
    return dataset.filter(lambda row: not row["Picture"])


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the generation's final answer is right."""
    (text,) = results
    return {"accuracy": float(is_right(text, doc["Answer"], doc["Answer_type"]))}


def is_right(text: str, answer: str, kind: str) -> bool:
    """Compare what follows the last "answer is" (or the whole text) with ``answer``.

    Args:
        kind: ``Answer_type``: bool, option, integer, float, or a list of numbers.
    """
    final = re.split(r"(?i)answer is:?", text)[-1].strip()
    if kind == "bool":
        words = [_YES_NO[w] for w in re.findall(r"[a-z]+", final.lower()) if w in _YES_NO]
        return bool(words) and words[0] == answer.strip().lower()
    if kind == "option":
        found = re.search(r"\(?\b([a-d])\b\)?", final.lower())
        return found is not None and found[1] == answer.strip(" ().").lower()
    expected, found_numbers = _numbers(answer), _numbers(final)
    if not kind.startswith("list"):
        expected, found_numbers = expected[:1], found_numbers[:1]
    return len(expected) == len(found_numbers) and all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-9)
        for a, b in zip(expected, found_numbers, strict=True)
    )


def _numbers(text: str) -> list[float]:
    """All numbers of ``text``; "1/2" is one, and the commas of "1,000" do not split it."""
    spaced = re.sub(r",(?!\d{3}\b)", ", ", text)
    return [_value(found.rstrip(",")) for found in _NUMBER.findall(spaced)]


def _value(number: str) -> float:
    top, _, bottom = number.replace(",", "").partition("/")
    return float(top) / (float(bottom) or math.nan) if bottom else float(top)
