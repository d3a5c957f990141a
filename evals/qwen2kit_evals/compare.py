"""Do two models' sample logs agree? Used to hold our adapter against lm-eval's ``hf`` model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2kit.errors import ParityError

Sample = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two logs of one task compare.

    Attributes:
        documents: documents compared.
        logprobs: log-probabilities compared.
        max_dlogp: largest absolute difference in nats; 0 if there were none.
        greedy_differ: log-probabilities whose is-greedy flags differ.
        answers_differ: documents whose likeliest choice differs.
        generations: texts compared.
        generations_differ: texts that differ.
        metrics_differ: documents with any different metric.
    """

    documents: int
    logprobs: int
    max_dlogp: float
    greedy_differ: int
    answers_differ: int
    generations: int
    generations_differ: int
    metrics_differ: int

    @property
    def same_answers(self) -> bool:
        """No choice, text or discrete metric differs."""
        return not (self.answers_differ or self.generations_differ)


def compare_samples(first: Sequence[Sample], second: Sequence[Sample]) -> Agreement:
    """Compare two logs (`results.sample_rows`) of one task.

    Raises:
        ParityError: the logs are of different documents or prompts.
    """
    pairs = list(_pairs(first, second))
    scored = [_scores(a, b) for a, b in pairs]
    flat = [both for document in scored for both in document]
    texts = [both for a, b in pairs for both in _texts(a, b)]
    return Agreement(
        documents=len(pairs),
        logprobs=len(flat),
        max_dlogp=max((abs(a[0] - b[0]) for a, b in flat), default=0.0),
        greedy_differ=sum(a[1] != b[1] for a, b in flat),
        answers_differ=sum(_choice(d, 0) != _choice(d, 1) for d in scored if len(d) > 1),
        generations=len(texts),
        generations_differ=sum(a != b for a, b in texts),
        metrics_differ=sum(_discrete(a) != _discrete(b) for a, b in pairs),
    )


def _pairs(first: Sequence[Sample], second: Sequence[Sample]) -> Iterator[tuple[Sample, Sample]]:
    if len(first) != len(second):
        raise ParityError(f"logs of {len(first)} and {len(second)} samples do not compare")
    for a, b in zip(first, second, strict=True):
        for key in ("doc_id", "filter", "arguments"):
            if a[key] != b[key]:
                raise ParityError(f"document {a['doc_id']}: {key} differs between the two logs")
        yield a, b


def _scores(a: Sample, b: Sample) -> list[tuple[tuple[float, bool], tuple[float, bool]]]:
    return [
        (_score(x), _score(y))
        for left, right in zip(a["responses"], b["responses"], strict=True)
        for x, y in zip(left, right, strict=True)
        if not isinstance(x, str)
    ]


def _score(response: Any) -> tuple[float, bool]:
    """A scored choice, or a rolling log-probability, which has no flag."""
    if isinstance(response, tuple | list):
        return float(response[0]), bool(response[1])
    return float(response), False


def _texts(a: Sample, b: Sample) -> Iterator[tuple[str, str]]:
    for left, right in zip(a["responses"], b["responses"], strict=True):
        yield from ((x, y) for x, y in zip(left, right, strict=True) if isinstance(x, str))


def _choice(scores: Sequence[Any], side: int) -> int:
    return max(range(len(scores)), key=lambda i: scores[i][side][0])


def _discrete(sample: Sample) -> dict[str, float]:
    """Metrics that count something; those computed from log-probabilities differ by rounding."""
    return {
        name: float(value)
        for name, value in sample["metrics"].items()
        if isinstance(value, int | float) and float(value).is_integer()
    }
