"""Beside the paper: what differs is said, and nothing is called the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit_evals.benchmarks import benchmark_score
from qwen2kit_evals.metric_rows import MetricRow
from qwen2kit_evals.paper import NOTHING_KNOWN, PaperRow, paper_rows
from qwen2kit_evals.suites import load_suite
from tests.unit.evals.stored_runs import row


def rows_for(
    results: list[dict[str, Any]], model: str = "qwen2-0.5b", **settings: Any
) -> dict[str, PaperRow]:
    document = {
        "results": results,
        "provenance": {"evaluation": {"chat_template": False} | settings},
    }
    return {entry.benchmark: entry for entry in paper_rows(document, model)}


def test_scores_are_in_percent_beside_the_figure() -> None:
    entry = rows_for([row("qwen2_mmlu", 0.451, samples=14042)])["MMLU"]
    assert entry.value == pytest.approx(45.1)
    assert entry.stderr == pytest.approx(1.0)
    assert entry.published is not None
    assert (entry.published.value, entry.published.mark) == (45.4, "recalled")
    assert entry.comparable
    assert entry.verdict == NOTHING_KNOWN


@pytest.mark.parametrize(
    ("changes", "settings", "difference"),
    [
        ({"shots": 0}, {}, "shots: 0 against 5"),
        ({"samples": 100}, {}, "subset: 100 of 14,042 questions"),
        ({"task": "mmlu"}, {}, "prompt without 'Question: '"),
        ({}, {"chat_template": True}, "prompt: in the chat template"),
    ],
)
def test_other_protocols_are_not_comparable(
    changes: dict[str, Any], settings: dict[str, Any], difference: str
) -> None:
    result = row("qwen2_mmlu", 0.5, samples=14042) | changes
    entry = rows_for([result], **settings)["MMLU"]
    assert not entry.comparable
    assert entry.verdict == f"not comparable: {difference}"


def test_instruct_models_state_no_shots() -> None:
    entry = rows_for([row("ifeval", 0.2, metric="prompt_level_strict_acc", samples=541, shots=0)],
                     "qwen2-0.5b-instruct", chat_template=True)["IFEval"]  # fmt: skip
    assert entry.verdict == "not comparable: shots: 0 against an unstated number of"
    assert entry.published is not None
    assert entry.published.mark == "read"


def test_gsm8k_shows_every_parser() -> None:
    results = [
        row("qwen2_gsm8k", value, metric=metric, samples=1319, shots=4)
        for metric, value in (
            ("strict_match", 0.3),
            ("flexible_match", 0.35),
            ("qwen_last_number", 0.36),
        )
    ]
    entry = rows_for(results)["GSM8K"]
    assert entry.value == pytest.approx(36.0)
    assert entry.beside == pytest.approx({"strict_match": 30.0, "flexible_match": 35.0})
    assert "not Qwen's own" in entry.verdict
    theirs = rows_for(
        [row("gsm8k", 0.3, metric="exact_match", filter="strict-match", samples=1319)]
    )
    assert "parser: lm-eval's" in theirs["GSM8K"].verdict


def test_parts_are_averaged_only_when_all_are_there() -> None:
    parts = [task for task in load_suite("qwen2-base").tasks if task.benchmark == "Multi-Exam"]
    assert [part.part for part in parts] == ["M3Exam", "IndoMMLU", "ruMMLU", "mMMLU"]
    results = [row(part.run, 0.1 * i, shots=part.shots) for i, part in enumerate(parts, 1)]
    entries = rows_for(results, "qwen2-7b")
    assert entries["Multi-Exam"].value == pytest.approx(25.0)
    assert entries["Multi-Exam"].published is not None
    assert not entries["Multi-Exam"].comparable
    document = {
        "results": [],
        "benchmarks": [
            {"benchmark": "Multi-Exam", "part": "M3Exam", "value": 40.0, "shots": 5},
            {"benchmark": "Multi-Exam", "part": "ruMMLU", "absent": "no data"},
        ],
        "provenance": {"evaluation": {"chat_template": False}},
    }
    *_, mean = paper_rows(document, "qwen2-7b")
    assert (mean.value, mean.verdict) == (None, "not run: no score of ruMMLU")


def test_a_tag_is_the_mean_of_its_tasks() -> None:
    task = next(t for t in load_suite("qwen2-base").tasks if t.run == "m_mmlu")
    rows = [MetricRow(**row(f"m_mmlu_{lang}", value)) for lang, value in (("de", 0.2), ("fr", 0.6))]
    score = benchmark_score(task, rows)
    assert (score.value, score.samples, score.shots) == (pytest.approx(40.0), 8, 5)
    assert score.stderr == pytest.approx(100 * (2 * 0.01**2) ** 0.5 / 2)
    missing = benchmark_score(task, [replace(rows[0], metric="other")])
    assert missing.absent == "the run gave no acc (none)"


def test_unpublished_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="no published scores of 'llama'"):
        rows_for([], "llama")
