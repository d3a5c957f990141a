"""Our scores beside the published ones, and whether the two may be compared at all.

Two scores are never called equal in protocol: the report prints no prompts. What is known to
differ is listed; where nothing is, the row says just that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

from qwen2kit_evals.benchmarks import FAILED, BenchmarkScore, recognised
from qwen2kit_evals.metric_rows import MetricRow
from qwen2kit_evals.suites import Figure, load_suite, published

NOTHING_KNOWN = "no known difference; the report prints no prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """One benchmark, ours and theirs.

    Attributes:
        benchmark: name; parts of one benchmark have rows of their own, without a figure.
        task: what was run.
        value, stderr, shots, samples: ours, in the report's scale.
        beside: our other scores of the same answers.
        published: the report's figure, or None.
        differs: known differences of protocol; one makes the two not comparable.
        absent: why there is no score of ours.
    """

    benchmark: str
    task: str
    value: float | None
    stderr: float | None
    shots: int | None
    samples: int
    beside: Mapping[str, float] = field(default_factory=dict)
    published: Figure | None = None
    differs: tuple[str, ...] = ()
    absent: str = ""

    @property
    def comparable(self) -> bool:
        """Both scores exist and nothing is known to differ."""
        return self.value is not None and self.published is not None and not self.differs

    @property
    def failed(self) -> bool:
        """Whether it was begun, and could not be asked of this model."""
        return self.absent.startswith(FAILED)

    @property
    def verdict(self) -> str:
        """For people: why not comparable, or that no difference is known."""
        if self.absent:
            return self.absent if self.failed else f"not run: {self.absent}"
        if self.published is None:
            return "no published figure"
        return "not comparable: " + "; ".join(self.differs) if self.differs else NOTHING_KNOWN


def paper_rows(document: Mapping[str, Any], model: str) -> tuple[PaperRow, ...]:
    """Rows for a run.

    Args:
        document: the content of results.json.
        model: whose published scores, as in `published_models`.

    Raises:
        ConfigError: nothing is published about ``model``.
    """
    figures = published(model)
    kind = "instruct" if model.endswith("-instruct") else "base"
    scores = _scores(document, kind)
    templated = bool(document["provenance"]["evaluation"]["chat_template"])
    prompt = _template_note(kind, templated)
    rows: list[PaperRow] = []
    for benchmark, group in groupby(scores, key=lambda score: score.benchmark):
        parts = list(group)
        if any(part.part for part in parts):
            rows += [_row(part, None, prompt) for part in parts]
            rows.append(_mean_row(benchmark, parts, figures.get(benchmark), prompt))
        else:
            rows += [_row(score, figures.get(benchmark), prompt) for score in parts]
    return tuple(rows)


def _scores(document: Mapping[str, Any], kind: str) -> Sequence[BenchmarkScore]:
    if document.get("benchmarks"):
        known = {item.name for item in fields(BenchmarkScore)}
        return [
            BenchmarkScore(**{k: v for k, v in entry.items() if k in known})
            for entry in document["benchmarks"]
        ]
    return recognised(
        [MetricRow(**row) for row in document["results"]], load_suite(f"qwen2-{kind}")
    )


def _template_note(kind: str, templated: bool) -> tuple[str, ...]:
    if templated == (kind == "instruct"):
        return ()
    return ("prompt: in the chat template",) if templated else ("prompt: no chat template",)


def _row(score: BenchmarkScore, figure: Figure | None, prompt: tuple[str, ...]) -> PaperRow:
    return PaperRow(
        benchmark=score.name,
        task=score.task,
        value=score.value,
        stderr=score.stderr,
        shots=score.shots,
        samples=score.samples,
        beside=score.beside,
        published=figure,
        differs=(*_differences(score, figure), *score.differs, *prompt),
        absent=score.absent,
    )


def _differences(score: BenchmarkScore, figure: Figure | None) -> Iterator[str]:
    if figure is not None and score.shots != figure.shots:
        theirs = "an unstated number of" if figure.shots is None else figure.shots
        ours = "varying" if score.shots is None else score.shots
        yield f"shots: {ours} against {theirs}"
    if score.size and score.samples != score.size:
        yield f"subset: {score.samples:,} of {score.size:,} questions"


def _mean_row(
    benchmark: str,
    parts: Sequence[BenchmarkScore],
    figure: Figure | None,
    prompt: tuple[str, ...],
) -> PaperRow:
    """The mean of a benchmark's parts, if all of them ran."""
    scored = [part for part in parts if part.value is not None]
    whole = len(scored) == len(parts)
    names = ", ".join(part.part for part in parts if part.value is None)
    notes = dict.fromkeys(
        f"{part.part} {note}"
        for part in parts
        for note in (*_differences(part, None), *part.differs)
    )
    return PaperRow(
        benchmark=benchmark,
        task=", ".join(part.task for part in parts),
        value=sum(part.value or 0 for part in parts) / len(parts) if whole else None,
        stderr=None,
        shots=figure.shots if figure else None,
        samples=sum(part.samples for part in parts),
        published=figure,
        differs=("weights of the parts: equal here, unstated in the report", *notes, *prompt),
        absent="" if whole else f"no score of {names}",
    )
