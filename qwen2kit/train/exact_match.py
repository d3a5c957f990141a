"""Exact match: greedy answers to questions that have one right answer. Works on any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.data.embedded import Question
from qwen2kit.engine.generate import generate
from qwen2kit.generate.sampling import Sampling
from qwen2kit.tokenizer.bpe import Tokenizer

LONGEST_ANSWER = 24  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatch:
    """The score.

    Attributes:
        correct, total: questions answered exactly, and asked.
        by_kind: ``(correct, total)`` per family of questions.
        answers: what was generated, in the order of the questions.
    """

    correct: int
    total: int
    by_kind: dict[str, tuple[int, int]]
    answers: tuple[str, ...]

    @property
    def score(self) -> float:
        """Share of exact answers, 0 to 1."""
        return self.correct / max(1, self.total)


def exact_match(
    model: CompiledModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    go_on: Callable[[], None] = lambda: None,
) -> ExactMatch:
    """Ask ``questions`` through the chat template; an answer counts if it equals the expected
    text and the model ended its turn by itself (surrounding white space is ignored).

    Args:
        batch: questions answered together.
        go_on: called before each batch; what it raises ends the work.
    """
    answers: list[str] = []
    for start in range(0, len(questions), batch):
        go_on()
        answers += _answers(model, tokenizer, questions[start : start + batch])
    by_kind: dict[str, tuple[int, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        correct, total = by_kind.get(question.kind, (0, 0))
        by_kind[question.kind] = (correct + (answer == question.answer), total + 1)
    return ExactMatch(
        correct=sum(correct for correct, _ in by_kind.values()),
        total=len(questions),
        by_kind=dict(sorted(by_kind.items())),
        answers=tuple(answers),
    )


def _answers(
    model: CompiledModel, tokenizer: Tokenizer, questions: Sequence[Question]
) -> list[str]:
    prompts = [tokenizer.encode_chat(q.messages, add_generation_prompt=True) for q in questions]
    sampling = Sampling(
        max_new_tokens=LONGEST_ANSWER,
        stop_token_ids=tokenizer.stop_ids,
        vocab_limit=tokenizer.vocab_size,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for event in generate(model, prompts, sampling):
        if event.finish_reason == "stop":
            ended[event.prompt] = True
        else:
            tokens[event.prompt].append(event.token)
    return [
        tokenizer.decode(ids).strip() if stopped else ""
        for ids, stopped in zip(tokens, ended, strict=True)
    ]
