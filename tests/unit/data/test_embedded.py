"""The embedded corpus: deterministic, right by independent recomputation, cleanly split."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from qwen2kit.data.embedded import KINDS, Question, conversation, generate


def text(question: Question) -> str:
    return question.messages[0]["content"]


def solve(kind: str, asked: str) -> str | None:
    """The answer worked out from the wording alone; None for invented facts."""
    numbers = [int(n) for n in re.findall(r"\d+", asked)]
    letters = asked.partition(": ")[2].rstrip("?").split()
    if kind == "add":
        return str(sum(numbers))
    if kind == "subtract":
        return str(numbers[0] - numbers[1])
    if kind == "next":
        return str(numbers[0] + (1 if "after" in asked else -1))
    if kind == "compare":
        return str(max(numbers) if "larger" in asked else min(numbers))
    if kind == "count":
        return str(len(letters))
    if kind == "sort":
        return "".join(sorted(re.findall(r"\d", asked)))
    if kind == "reverse":
        return " ".join(letters[::-1])
    if kind == "ends":
        return letters[0] if "first" in asked else letters[-1]
    return None


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right(held_out: bool) -> None:
    solved: Counter[str] = Counter()
    for question in generate(0, 1500 if not held_out else 300, held_out):
        expected = solve(question.kind, text(question))
        if expected is not None:
            assert question.answer == expected, text(question)
            solved[question.kind] += 1
    assert solved.keys() == set(KINDS) - {"capital", "flag"}


def test_splits_share_no_question_and_facts_agree() -> None:
    train = list(generate(0, 20_000))
    held = list(generate(0, 300, True))
    asked = {text(q) for q in train}
    assert len({text(q) for q in held}) == 300
    assert not asked & {text(q) for q in held}
    sums = {
        frozenset(Counter(re.findall(r"\d+", text(q))).items()) for q in train if q.kind == "add"
    }
    for question in held:
        if question.kind == "add":
            operands = frozenset(Counter(re.findall(r"\d+", text(question))).items())
            assert operands not in sums, "a + b was trained on as b + a"
    facts: dict[tuple[str, str], set[str]] = {}
    for question in train + held:
        if question.kind in ("capital", "flag"):
            place = next(w for w in re.findall(r"[A-Z]\w+", text(question)) if w not in _STARTS)
            facts.setdefault((question.kind, place), set()).add(question.answer)
    assert len(facts) == 40
    assert all(len(answers) == 1 for answers in facts.values())
    assert {q.kind for q in train} == set(KINDS)


_STARTS = {"What", "Name", "Which", "Tell", "Where", "The"}


def test_same_in_another_process_and_other_for_another_seed() -> None:
    code = (
        "from qwen2kit.data.embedded import generate;"
        "print([(q.messages[0]['content'], q.answer) for q in generate(4, 50)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [(text(q), q.answer) for q in generate(4, 50)]
    assert done.stdout.strip() == str(here)
    assert here != [(text(q), q.answer) for q in generate(5, 50)]


def test_a_conversation_is_the_question_and_its_answer() -> None:
    question = next(generate(0, 1))
    assert conversation(question) == [
        {"role": "user", "content": text(question)},
        {"role": "assistant", "content": question.answer},
    ]
