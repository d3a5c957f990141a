"""What the judge is told, and how its verdict is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

from qwen2kit_evals.judge.questions import OpenQuestion

Message = dict[str, str]
Order = Literal["model first", "baseline first"]
ORDERS: Final[tuple[Order, ...]] = ("model first", "baseline first")

_GRADE = """You grade the work of an AI assistant. Below is a conversation; grade the assistant's \
last answer only, in view of what came before.

Ask yourself whether it does what the user wants, whether what it says is true, whether anything \
that matters is missing, and whether it is clear. Length is no merit. Write at most five sentences \
about its strengths and errors. Then end with a line of the form

Grade: [[n]]

where n is a whole number from 1 (useless) to 10 (could not be better)."""

_COMPARE = """You compare the work of two AI assistants, A and B, who had the same conversation \
with a user. Judge their last answers, in view of what came before.

Ask yourself which of them better does what the user wants, is more often true, leaves out less \
that matters and is clearer. Length is no merit, and neither is coming first. Write at most five \
sentences on how they differ. Then end with a line of the form

Verdict: [[v]]

where v is A (A is better), B (B is better) or tie (neither is)."""

_REFERENCE = "\n\nA correct answer to the last question, for you alone:\n\n{}"
_GRADE_FORM = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_VERDICT_FORM = re.compile(r"\[\[\s*(A|B|tie)\s*\]\]", re.IGNORECASE)
_HIGHEST = 10


def grading(question: OpenQuestion, answers: Sequence[str]) -> list[Message]:
    """Messages that ask for a grade of the last of ``answers``."""
    shown = f"{_dialogue(question, answers)}{_reference(question, len(answers))}"
    return [{"role": "system", "content": _GRADE}, {"role": "user", "content": shown}]


def comparison(
    question: OpenQuestion, answers: Sequence[str], baseline: Sequence[str], order: Order
) -> list[Message]:
    """Messages that ask which of two last answers is better."""
    pair = (answers, baseline) if order == "model first" else (baseline, answers)
    shown = "\n\n".join(
        f"=== Conversation with assistant {name} ===\n\n{_dialogue(question, said)}"
        for name, said in zip("AB", pair, strict=True)
    )
    shown += _reference(question, len(answers))
    return [{"role": "system", "content": _COMPARE}, {"role": "user", "content": shown}]


def read_grade(judgment: str) -> float | None:
    """The last grade in a judgment; None if there is none from 1 to 10."""
    found = _GRADE_FORM.findall(judgment)
    grade = float(found[-1]) if found else 0.0
    return grade if 1 <= grade <= _HIGHEST else None


def read_verdict(judgment: str, order: Order) -> float | None:
    """1 if the model won, 0 if the baseline did, 0.5 for a tie; None without a verdict."""
    found = _VERDICT_FORM.findall(judgment)
    if not found:
        return None
    if found[-1].lower() == "tie":
        return 0.5
    return float((found[-1].upper() == "A") == (order == "model first"))


def _dialogue(question: OpenQuestion, answers: Sequence[str]) -> str:
    return "\n\n".join(
        f"[User]\n{turn}\n\n[Assistant]\n{said}"
        for turn, said in zip(question.turns, answers, strict=False)
    )


def _reference(question: OpenQuestion, turn: int) -> str:
    known = question.reference[turn - 1 : turn]
    return _REFERENCE.format(known[0]) if known and known[0] else ""
