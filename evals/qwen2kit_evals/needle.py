"""Needle in a haystack: a fact hidden at a depth of a long text, and a question about it.

After G. Kamradt's test (https://github.com/gkamradt/LLMTest_NeedleInAHaystack), with two changes
that make it exact: the fact is a random number, different in every cell, so that no model knows it
and an answer is right or wrong without a judge; and the length is that of the whole prompt in the
model's own tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError, DataError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit_evals.answering import answer
from qwen2kit_evals.request_log import RequestLog

ANSWER_TOKENS: Final = 32
_CITIES = (
    "Lisbon", "Nairobi", "Kyoto", "Bogota", "Tallinn", "Hanoi", "Quito", "Tunis", "Oslo", "Perth",
    "Lima", "Riga", "Cairo", "Turin", "Dakar", "Seoul",
)  # fmt: skip
_FACT = "The secret number of {city} is {number}."
_TASK = "Read this text. One sentence in it gives a secret number.\n\n{text}\n\n"
_QUESTION = "What is the secret number of {city}? Answer with the number alone."
_LEAD = "Question: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n\s*\n")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One question.

    Attributes:
        length: prompt length asked for, in tokens.
        depth: where the fact is, in per cent of the text before the question (0: at its beginning).
        repeat: number among the cell's repeats; each has its own city and number.
    """

    length: int
    depth: float
    repeat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleRow:
    """An answered question.

    Attributes:
        cell: the question's place in the grid.
        prompt_tokens: actual length; at most ``cell.length``.
        depth: actual depth in per cent of the text's characters; sentences are not cut.
        expected: the number that was hidden.
        answer: what the model said.
        correct: whether the first number in ``answer`` is the one hidden.
    """

    cell: Cell
    prompt_tokens: int
    depth: float
    expected: str
    answer: str
    correct: bool


class Haystack:
    """Text to hide facts in.

    Args:
        path: a text file, or a directory whose ``.txt`` and ``.md`` files are joined by name and
            repeated as often as a length needs.
        tokenizer: counts tokens.

    Raises:
        DataError: no text there.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._costs: dict[str, int] = {}
        files = [path] if path.is_file() else sorted([*path.glob("*.txt"), *path.glob("*.md")])
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        self._sentences = [
            sentence.strip()
            for text in texts
            for sentence in _SENTENCE_END.split(text)
            if sentence.strip()
        ]
        if not self._sentences:
            raise DataError(f"{path} holds no text; name a .txt file or a directory of them")

    def sentences(self, budget: int) -> list[str]:
        """Leading sentences that together have at most ``budget`` tokens (each counted alone)."""
        kept: list[str] = []
        for sentence in cycle(self._sentences):
            budget -= self._cost(sentence)
            if budget < 0:
                return kept
            kept.append(sentence)
        raise AssertionError("a cycle does not end")

    def _cost(self, sentence: str) -> int:
        if sentence not in self._costs:
            self._costs[sentence] = len(self.tokenizer.encode(" " + sentence))
        return self._costs[sentence]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A cell made concrete.

    Attributes:
        cell: its place in the grid.
        prompt: text to continue, chat template included.
        tokens: its length.
        depth: actual depth in per cent.
        expected: the number hidden.
    """

    cell: Cell
    prompt: str
    tokens: int
    depth: float
    expected: str


def grid(lengths: Sequence[int], depths: Sequence[float], repeats: int = 1) -> list[Cell]:
    """All cells, shortest first.

    Raises:
        ConfigError: no length or depth, a depth outside 0...100, or ``repeats`` below 1.
    """
    if not lengths or not depths or repeats < 1:
        raise ConfigError("needle needs at least one length, one depth and one repeat")
    if any(not 0 <= depth <= 100 for depth in depths):
        raise ConfigError(f"--depths must be between 0 and 100 per cent, got {list(depths)}")
    return [
        Cell(length=length, depth=depth, repeat=repeat)
        for length in sorted({*lengths})
        for depth in sorted({*depths})
        for repeat in range(repeats)
    ]


def ask(haystack: Haystack, cell: Cell, *, chat: bool, seed: int) -> Question:
    """The question of one cell: as many whole sentences as its length allows.

    Args:
        chat: put it into the model's chat template; otherwise the prompt ends in the words that
            the number must follow.
        seed: of city and number.

    Raises:
        ConfigError: the length leaves no room for a text.
    """
    tokenizer = haystack.tokenizer
    draw = random.Random(f"{seed} {cell.length} {cell.depth} {cell.repeat}")
    city, number = draw.choice(_CITIES), str(draw.randrange(1_000_000, 10_000_000))
    fact = _FACT.format(city=city, number=number)
    empty = len(tokenizer.encode(_prompt(tokenizer, fact, city, chat)))
    budget = cell.length - empty
    while budget > 0:
        sentences = haystack.sentences(budget)
        if not sentences:
            break
        text, depth = _hide(sentences, fact, cell.depth)
        prompt = _prompt(tokenizer, text, city, chat)
        tokens = len(tokenizer.encode(prompt))
        if tokens <= cell.length:
            return Question(cell=cell, prompt=prompt, tokens=tokens, depth=depth, expected=number)
        budget -= tokens - cell.length
    raise ConfigError(
        f"a length of {cell.length} tokens is too short: the question alone has {empty}"
    )


def run_needles(
    loaded: LoadedModel,
    haystack: Haystack,
    cells: Sequence[Cell],
    *,
    chat: bool,
    seed: int,
    batch_size: int | None,
    log: RequestLog,
) -> list[NeedleRow]:
    """Ask every cell, greedily.

    Raises:
        ConfigError: a length exceeds the model's context, or is too short for the question.
    """
    limit = loaded.model.spec.context_length - ANSWER_TOKENS
    if (longest := max(cell.length for cell in cells)) > limit:
        raise ConfigError(
            f"a length of {longest} tokens exceeds what this model takes beside an answer: {limit}"
        )
    questions = [ask(haystack, cell, chat=chat, seed=seed) for cell in cells]
    settings = {"until": ["\n\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}
    texts = answer(
        loaded,
        [question.prompt for question in questions],
        settings,
        log=log,
        batch_size=batch_size,
        label="Needles",
    )
    return [
        NeedleRow(
            cell=question.cell,
            prompt_tokens=question.tokens,
            depth=question.depth,
            expected=question.expected,
            answer=text,
            correct=first_number(text) == question.expected,
        )
        for question, text in zip(questions, texts, strict=True)
    ]


def first_number(text: str) -> str | None:
    """The first run of digits in ``text``, thousands separators dropped."""
    found = _NUMBER.search(re.sub(r"(?<=\d)[,\u202f\u00a0 ](?=\d{3})", "", text))
    return None if found is None else found[0]


def accuracies(rows: Sequence[NeedleRow]) -> list[dict[str, Any]]:
    """Per cell of the grid: share of repeats answered correctly."""
    cells: dict[tuple[int, float], list[NeedleRow]] = {}
    for row in rows:
        cells.setdefault((row.cell.length, row.cell.depth), []).append(row)
    return [
        {
            "length": length,
            "depth": depth,
            "prompt_tokens": max(row.prompt_tokens for row in found),
            "questions": len(found),
            "accuracy": sum(row.correct for row in found) / len(found),
        }
        for (length, depth), found in cells.items()
    ]


def _hide(sentences: Sequence[str], fact: str, depth: float) -> tuple[str, float]:
    """The text with ``fact`` between two sentences, and the depth in per cent it came to."""
    total = sum(map(len, sentences))
    ends = [0]
    for sentence in sentences:
        ends.append(ends[-1] + len(sentence))
    place = min(range(len(ends)), key=lambda index: abs(ends[index] - total * depth / 100))
    text = " ".join([*sentences[:place], fact, *sentences[place:]])
    return text, 100 * ends[place] / total


def _prompt(tokenizer: Tokenizer, text: str, city: str, chat: bool) -> str:
    task = _TASK.format(text=text)
    if not chat:
        return task + _LEAD.format(city=city)
    message = {"role": "user", "content": task + _QUESTION.format(city=city)}
    return tokenizer.render_chat([message], add_generation_prompt=True)
