"""Have the model answer, have the judge judge, and average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import DataError, TokenizerError
from qwen2kit_evals.answering import answer
from qwen2kit_evals.averages import mean_and_stderr
from qwen2kit_evals.judge.client import JudgeServer
from qwen2kit_evals.judge.prompts import (
    ORDERS,
    Message,
    Order,
    comparison,
    grading,
    read_grade,
    read_verdict,
)
from qwen2kit_evals.judge.questions import OpenQuestion
from qwen2kit_evals.request_log import RequestLog

Answers = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """What the judge said of one answer.

    Attributes:
        name, category: of the question.
        turn: number of the answer, from 1.
        order: in a comparison, who was shown first; None for a grade.
        text: the judgment.
        score: grade from 1 to 10; or 1, 0.5, 0 for a win, tie or loss of the model; None if the
            judgment holds no verdict.
    """

    name: str
    category: str
    turn: int
    order: Order | None
    text: str
    score: float | None


@dataclass(frozen=True, slots=True)
class _Open:
    question: OpenQuestion
    turn: int
    order: Order | None
    messages: list[Message]

    def judged(self, text: str) -> Judgment:
        score = read_grade(text) if self.order is None else read_verdict(text, self.order)
        name, category = self.question.name, self.question.category
        return Judgment(
            name=name, category=category, turn=self.turn, order=self.order, text=text, score=score
        )


def answer_questions(
    loaded: LoadedModel,
    questions: Sequence[OpenQuestion],
    gen_kwargs: Mapping[str, Any],
    *,
    log: RequestLog,
    batch_size: int | None,
) -> dict[str, list[str]]:
    """The model's answers per question, turn after turn, through its chat template.

    Raises:
        TokenizerError: the model has no chat template.
        Qwen2KitError: as `answer`.
    """
    if loaded.tokenizer.chat_template is None:
        raise TokenizerError("the model has no chat template; judged answers need a chat model")
    answers: dict[str, list[str]] = {question.name: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        open_ = [question for question in questions if turn < len(question.turns)]
        prompts = [
            loaded.tokenizer.render_chat(
                _history(question, answers[question.name]), add_generation_prompt=True
            )
            for question in open_
        ]
        label = f"Answers, turn {turn + 1}"
        texts = answer(loaded, prompts, gen_kwargs, log=log, batch_size=batch_size, label=label)
        for question, text in zip(open_, texts, strict=True):
            answers[question.name].append(text.strip())
    return answers


def judge_answers(
    server: JudgeServer,
    questions: Sequence[OpenQuestion],
    answers: Answers,
    *,
    baseline: Answers | None = None,
    log: RequestLog,
    workers: int = 4,
) -> list[Judgment]:
    """A grade per answer; with ``baseline`` instead two comparisons per answer, the answers
    swapped in the second.

    Args:
        log: judgments that are known, and where new ones go.
        workers: requests to the judge at the same time.

    Raises:
        DataError: the baseline lacks an answer.
        BackendError: the judge cannot be asked.
    """
    open_ = [
        one
        for question in questions
        for turn in range(1, len(question.turns) + 1)
        for one in _requests(question, turn, answers, baseline)
    ]
    texts = _ask_all(server, [one.messages for one in open_], log, workers)
    return [one.judged(text) for one, text in zip(open_, texts, strict=True)]


def summary(judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """Means over everything, per turn and per category.

    ``value`` is the mean grade, or the win rate with ties as half a win; of comparisons,
    ``consistent`` is the share of pairs whose two orders agree. Errors are over questions.
    """
    groups: dict[tuple[str, str], list[Judgment]] = {}
    for judgment in judgments:
        labels = [("all", ""), ("turn", str(judgment.turn))]
        labels += [("category", judgment.category)] if judgment.category else []
        for label in labels:
            groups.setdefault(label, []).append(judgment)
    return [_mean(kind, of, found) for (kind, of), found in sorted(groups.items())]


def _mean(kind: str, of: str, judgments: Sequence[Judgment]) -> dict[str, Any]:
    per_question: dict[str, list[float]] = {}
    pairs: dict[tuple[str, int], set[float | None]] = {}
    for judgment in judgments:
        if judgment.score is not None:
            per_question.setdefault(judgment.name, []).append(judgment.score)
        pairs.setdefault((judgment.name, judgment.turn), set()).add(judgment.score)
    values = [sum(scores) / len(scores) for scores in per_question.values()]
    value, stderr = mean_and_stderr(values) if values else (None, None)
    row = {
        "kind": kind,
        "of": of,
        "value": value,
        "stderr": stderr,
        "questions": len(values),
        "judgments": len(judgments),
        "unreadable": sum(judgment.score is None for judgment in judgments),
    }
    if judgments[0].order is not None:
        agreed = [len(scores) == 1 and None not in scores for scores in pairs.values()]
        row["consistent"] = sum(agreed) / len(pairs)
    return row


def _requests(
    question: OpenQuestion, turn: int, answers: Answers, baseline: Answers | None
) -> list[_Open]:
    said = answers[question.name][:turn]
    if baseline is None:
        return [_Open(question, turn, None, grading(question, said))]
    other = baseline.get(question.name, ())[:turn]
    if len(other) < turn:
        raise DataError(f"the baseline has no answer to question {question.name}, turn {turn}")
    return [
        _Open(question, turn, order, comparison(question, said, other, order)) for order in ORDERS
    ]


def _ask_all(
    server: JudgeServer, requests: Sequence[list[Message]], log: RequestLog, workers: int
) -> list[str]:
    keys = log.text_keys([[messages] for messages in requests], [server.model, server.max_tokens])
    texts, open_ = log.look_up(keys)
    bar = tqdm(total=len(keys), initial=len(keys) - len(open_), desc="Judging")
    with bar, ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(server.ask, requests[index]): index for index in open_}
        try:
            for future in as_completed(running):
                index = running[future]
                texts[index] = future.result()
                log.add(keys[index], texts[index])
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return texts


def _history(question: OpenQuestion, answers: Sequence[str]) -> list[Message]:
    messages: list[Message] = []
    for turn, said in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def sample_rows(
    questions: Sequence[OpenQuestion], answers: Answers, judgments: Sequence[Judgment]
) -> list[dict[str, Any]]:
    """One row per question: what was asked, answered and judged."""
    return [
        {
            "id": question.name,
            "category": question.category,
            "turns": list(question.turns),
            "answers": list(answers[question.name]),
            "judgments": [
                {"turn": j.turn, "order": j.order, "score": j.score, "text": j.text}
                for j in judgments
                if j.name == question.name
            ],
        }
        for question in questions
    ]
