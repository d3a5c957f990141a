"""Which test questions occur in training data, and the scores without them.

As in the Qwen2 report, the strict analysis calls a question contaminated if it shares a 13-gram
with any training text; the rule for cleaning training data adds a long common subsequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen2kit.errors import DataError
from qwen2kit_evals.ngrams import SHARE, N, NgramIndex, tokens
from qwen2kit_evals.paired import resampled_means
from qwen2kit_evals.stored_run import StoredRun, file_name, numbers

Rule = Literal["ngram", "lcs", "window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContamination:
    """One task's questions that training data contain.

    Attributes:
        task: its name.
        documents: questions in it.
        ngram: lm-eval's numbers of those that share a 13-gram with a training text.
        lcs: of those that the subsequence rule finds too.
        window: of those that it finds near the shared 13-gram.
    """

    task: str
    documents: int
    ngram: tuple[int, ...]
    lcs: tuple[int, ...]
    window: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanScore:
    """A metric on all, clean and contaminated questions (strict analysis).

    Attributes:
        task, filter, metric: which.
        documents, contaminated: counts.
        score_all, score_clean, score_contaminated: means; None without documents.
        low, high: 95 % bootstrap interval of clean - all; None if nothing is contaminated.
    """

    task: str
    filter: str
    metric: str
    documents: int
    contaminated: int
    score_all: float
    score_clean: float | None
    score_contaminated: float | None
    low: float | None
    high: float | None


def check_contamination(
    train: Iterable[str], tests: Mapping[str, Sequence[str]]
) -> tuple[TaskContamination, ...]:
    """Stream ``train`` once and look for the questions of every task.

    Raises:
        DataError: no training text.
    """
    places = [(task, number) for task, texts in tests.items() for number in range(len(texts))]
    index = NgramIndex([tokens(text) for texts in tests.values() for text in texts])
    found: dict[Rule, set[int]] = {"ngram": set(), "lcs": set(), "window": set()}
    seen = False
    for text in train:
        seen = True
        for match in index.matches(tokens(text)):
            found["ngram"].add(match.test)
            found["lcs"] |= {match.test} if match.lcs else set()
            found["window"] |= {match.test} if match.window else set()
    if not seen:
        raise DataError("the training data hold no text")

    def of(task: str, rule: Rule) -> tuple[int, ...]:
        return tuple(places[test][1] for test in sorted(found[rule]) if places[test][0] == task)

    return tuple(
        TaskContamination(
            task=task,
            documents=len(texts),
            ngram=of(task, "ngram"),
            lcs=of(task, "lcs"),
            window=of(task, "window"),
        )
        for task, texts in tests.items()
    )


def write_contamination(
    found: Sequence[TaskContamination], path: Path, *, train: Sequence[str]
) -> dict[str, Any]:
    """Write ``found`` as JSON; returns the document."""
    rule = {"ngram": N, "lcs_share": SHARE}
    document = {"train": list(train), "rule": rule, "tasks": [asdict(task) for task in found]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def read_contamination(path: Path) -> tuple[TaskContamination, ...]:
    """What `write_contamination` wrote.

    Raises:
        DataError: the file is missing or not of that form.
    """
    try:
        return tuple(
            TaskContamination(
                task=entry["task"],
                documents=entry["documents"],
                ngram=tuple(entry["ngram"]),
                lcs=tuple(entry["lcs"]),
                window=tuple(entry["window"]),
            )
            for entry in json.loads(path.read_text(encoding="utf-8"))["tasks"]
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a result of eval contamination") from error


def clean_scores(run: StoredRun, found: Sequence[TaskContamination]) -> tuple[CleanScore, ...]:
    """Scores of the run's tasks on all, clean and contaminated questions."""
    rows = []
    for task in found:
        dirty = set(task.ngram)
        scored: dict[tuple[str, str], list[tuple[bool, float]]] = {}
        for sample in run.samples.get(file_name(task.task), ()):
            for metric, value in numbers(sample).items():
                entry = (sample["doc_id"] in dirty, value)
                scored.setdefault((sample["filter"], metric), []).append(entry)
        rows += [_clean_score(task.task, *key, values) for key, values in sorted(scored.items())]
    return tuple(rows)


def _clean_score(
    task: str, chosen: str, metric: str, values: Sequence[tuple[bool, float]]
) -> CleanScore:
    dirty = np.array([is_dirty for is_dirty, _ in values])
    scores = np.array([value for _, value in values])
    clean, contaminated = scores[~dirty], scores[dirty]
    low, high = _interval(scores, dirty) if clean.size and contaminated.size else (None, None)
    return CleanScore(
        task=task,
        filter=chosen,
        metric=metric,
        documents=len(values),
        contaminated=int(dirty.sum()),
        score_all=float(scores.mean()),
        score_clean=float(clean.mean()) if clean.size else None,
        score_contaminated=float(contaminated.mean()) if contaminated.size else None,
        low=low,
        high=high,
    )


def _interval(scores: Any, dirty: Any) -> tuple[float, float]:
    """Of mean(clean) - mean(all) = share of dirty x (mean(clean) - mean(dirty)), both subsets
    resampled by themselves."""
    rng = np.random.default_rng(0)
    clean, contaminated = scores[~dirty], scores[dirty]
    gaps = resampled_means(clean, rng) - resampled_means(contaminated, rng)
    low, high = np.quantile(dirty.mean() * gaps, [0.025, 0.975])
    return float(low), float(high)
