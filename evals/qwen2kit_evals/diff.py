"""Two runs compared sample by sample: flips, log-probabilities, texts, significance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen2kit.errors import ConfigError
from qwen2kit_evals.paired import Difference, paired_difference
from qwen2kit_evals.stored_run import Sample, StoredRun, by_document, numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A document that one run got right and the other wrong.

    Attributes:
        doc_id: lm-eval's number of the document.
        gained: whether the second run is the one that got it right.
    """

    doc_id: int
    gained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDiff:
    """One metric of one task in both runs.

    Attributes:
        task, filter, metric: which.
        documents: scored by both runs.
        first, second: mean scores over those documents.
        difference: second - first, with interval and p-value.
        flips: documents scored 1 by one run and 0 by the other.
    """

    task: str
    filter: str
    metric: str
    documents: int
    first: float
    second: float
    difference: Difference
    flips: tuple[Flip, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDiff:
    """One task in both runs.

    Attributes:
        task: its name.
        only_first, only_second: documents that only one run has.
        prompts_differ: common documents whose prompts are not the same text.
        logprobs: log-probabilities of equal prompts in both runs.
        mean_dlogp, max_dlogp: their absolute differences in nats.
        texts, texts_differ: generations compared, and those that differ.
        metrics: scores.
    """

    task: str
    only_first: int
    only_second: int
    prompts_differ: int
    logprobs: int
    mean_dlogp: float
    max_dlogp: float
    texts: int
    texts_differ: int
    metrics: tuple[MetricDiff, ...]


def diff_runs(first: StoredRun, second: StoredRun) -> tuple[TaskDiff, ...]:
    """Compare the tasks that both runs have.

    Raises:
        ConfigError: they have no document in common.
    """
    common = [task for task in first.samples if task in second.samples]
    diffs = [_diff_task(task, first.samples[task], second.samples[task]) for task in common]
    found = tuple(diff for diff in diffs if diff.metrics or diff.logprobs or diff.texts)
    if not found:
        raise ConfigError(
            f"{first.directory} and {second.directory} have no answered document in common"
        )
    return found


def _diff_task(task: str, first: Sequence[Sample], second: Sequence[Sample]) -> TaskDiff:
    a, b = by_document(first), by_document(second)
    pairs = [
        (sample, b[key]) for key, sample in a.items() if key in b and _same_row(sample, b[key])
    ]
    shared = {x["doc_id"] for x, _ in pairs}
    unfiltered = {x["doc_id"]: (x, y) for x, y in pairs}.values()  # answers repeat per filter
    alike = [(x, y) for x, y in unfiltered if x["arguments"] == y["arguments"]]
    gaps = [abs(p - q) for x, y in alike for p, q in _logprobs(x, y)]
    texts = [p != q for x, y in unfiltered for p, q in _answers(x, y) if isinstance(p, str)]
    return TaskDiff(
        task=task,
        only_first=len({key[0] for key in a} - shared),
        only_second=len({key[0] for key in b} - shared),
        prompts_differ=len(unfiltered) - len(alike),
        logprobs=len(gaps),
        mean_dlogp=sum(gaps) / len(gaps) if gaps else 0.0,
        max_dlogp=max(gaps, default=0.0),
        texts=len(texts),
        texts_differ=sum(texts),
        metrics=tuple(_metric_diffs(task, pairs)),
    )


def _same_row(a: Sample, b: Sample) -> bool:
    return bool(a["doc_hash"] == b["doc_hash"])


def _metric_diffs(task: str, pairs: Sequence[tuple[Sample, Sample]]) -> Iterator[MetricDiff]:
    scored: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for a, b in pairs:
        mine, theirs = numbers(a), numbers(b)
        for metric in mine.keys() & theirs.keys():
            scores = (a["doc_id"], mine[metric], theirs[metric])
            scored.setdefault((a["filter"], metric), []).append(scores)
    for (chosen, metric), rows in sorted(scored.items()):
        first, second = [row[1] for row in rows], [row[2] for row in rows]
        yield MetricDiff(
            task=task,
            filter=chosen,
            metric=metric,
            documents=len(rows),
            first=sum(first) / len(rows),
            second=sum(second) / len(rows),
            difference=paired_difference(first, second),
            flips=tuple(
                Flip(doc_id=doc, gained=y > x) for doc, x, y in rows if {x, y} == {0.0, 1.0}
            ),
        )


def _answers(a: Sample, b: Sample) -> Iterator[tuple[object, object]]:
    for left, right in zip(a["responses"], b["responses"], strict=False):
        yield from zip(left, right, strict=False)


def _logprobs(a: Sample, b: Sample) -> Iterator[tuple[float, float]]:
    for p, q in _answers(a, b):
        if not isinstance(p, str):
            yield _logprob(p), _logprob(q)


def _logprob(response: object) -> float:
    """Of a scored choice ``[logprob, is_greedy]``, or a rolling log-probability."""
    value = response[0] if isinstance(response, list | tuple) else response
    return float(value)  # type: ignore[arg-type]
