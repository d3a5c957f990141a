"""Suites and published scores: complete, consistent, and never more certain than they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.listing import suite_offers
from qwen2kit_evals.local_data import LocalData
from qwen2kit_evals.suite_tasks import select_suite
from qwen2kit_evals.suites import load_suite, published, published_models, suite_names
from qwen2kit_evals.task_fit import local_name
from qwen2kit_evals.tasks import leaf_configs, task_manager
from tests.unit.evals.test_local_data import write_set

# Shots of the report's tables for base models (qwen2.org model card of Qwen2-7B).
REPORT_SHOTS = {
    "MMLU": 5, "MMLU-Pro": 5, "GPQA": 5, "TheoremQA": 5, "BBH": 3, "HellaSwag": 10,
    "Winogrande": 5, "ARC-C": 25, "TruthfulQA": 0, "HumanEval": 0, "MBPP": 0, "GSM8K": 4,
    "MATH": 4, "C-Eval": 5, "CMMLU": 5, "IndoMMLU": 3, "XStoryCloze": 0, "PAWS-X": 5,
    "Multi-Mathematics": 8, "Multi-Translation": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return task_manager()


def test_shots_are_the_reports() -> None:
    tasks = load_suite("qwen2-base").tasks
    ours = {task.part or task.benchmark: task.shots for task in tasks}
    assert {name: ours[name] for name in REPORT_SHOTS} == REPORT_SHOTS


@pytest.mark.parametrize("name", suite_names())
def test_every_task_exists_and_reads_the_data_it_names(name: str, manager: TaskManager) -> None:
    for task in load_suite(name).tasks:
        assert bool(task.run) != bool(task.why), task.name
        for run in [task.run] * bool(task.run) + list(task.near):
            assert manager.match_tasks([run]), f"{task.name}: lm-eval has no {run}"
        runs = manager.match_tasks([task.run]) if task.run else []
        leaves = [leaf for run in runs for leaf in leaf_configs(run, manager)]
        assert {local_name(leaf) for leaf in leaves} <= set(task.data), task.name


@pytest.mark.parametrize("name", suite_names())
def test_every_published_benchmark_is_in_its_suite(name: str) -> None:
    suite = load_suite(name)
    suffix = "" if suite.kind == "base" else "-instruct"
    known = {
        benchmark for size in ("72b", "0.5b") for benchmark in published(f"qwen2-{size}{suffix}")
    }
    assert known <= {task.benchmark for task in suite.tasks}


@pytest.mark.parametrize(
    ("model", "benchmark", "value", "shots", "mark"),
    [
        ("qwen2-72b", "MMLU", 84.2, 5, "read"),
        ("qwen2-0.5b", "MMLU", 45.4, 5, "recalled"),
        ("Qwen/Qwen2-72B", "GSM8K", 89.5, 4, "read"),
        ("qwen2-0.5b-instruct", "GSM8K", 40.1, None, "card"),
        ("qwen2-1.5b-instruct", "IFEval", 29.0, None, "read"),
        ("qwen2-7b-instruct", "MMLU", 70.5, None, "recalled"),
        ("qwen2-72b-instruct", "MT-Bench", 9.12, None, "read"),
    ],
)
def test_published_figures(
    model: str, benchmark: str, value: float, shots: int | None, mark: str
) -> None:
    figure = published(model)[benchmark]
    assert asdict(figure) == {"value": value, "shots": shots, "mark": mark}


def test_unknown_names_come_with_the_known_ones() -> None:
    assert len(published_models()) == 10
    with pytest.raises(ConfigError, match=r"did you mean qwen2-7b\?"):
        published("qwen2-7")
    with pytest.raises(ConfigError, match="qwen2-base, qwen2-instruct"):
        load_suite("qwen3")


def test_list_says_what_is_missing(tmp_path: Path, manager: TaskManager) -> None:
    write_set(tmp_path, "openai/gsm8k", {"main": {"train": 1, "test": 1}})
    write_set(tmp_path, "Rowan/hellaswag", {"default": {"validation": 1}})
    found = suite_offers(LocalData(tmp_path), manager)
    offers = {offer.benchmark: offer for offer in found if offer.suite == "qwen2-base"}
    assert (offers["GSM8K"].missing, offers["GSM8K"].why) == ((), "")
    assert "draws its 10 shots from split 'train'" in offers["HellaSwag"].why
    assert offers["CMMLU"].missing == ("haonan-li/cmmlu",)
    assert offers["MultiPL-E"].why == "needs the compilers of eight languages"


def test_absent_data_leave_a_benchmark_in_the_results(tmp_path: Path, manager: TaskManager) -> None:
    selection = select_suite("qwen2-base", datasets=tmp_path, manager=manager)
    assert selection.selections == ()
    scores = selection.scores([])
    assert len(scores) == len(load_suite("qwen2-base").tasks)
    assert all(score.value is None and score.absent for score in scores)
    mmlu = next(score for score in scores if score.benchmark == "MMLU")
    assert f"expected {tmp_path}/cais/mmlu" in mmlu.absent
    assert f"MMLU is not run: {mmlu.absent}" in selection.notices
    with pytest.raises(DataError, match="no such directory"):
        select_suite("qwen2-base", datasets=tmp_path / "nowhere", manager=manager)


def test_nothing_is_downloaded_while_data_are_local(
    tmp_path: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("immutabledict")
    write_set(tmp_path, "google/IFEval", {"default": {"train": 1}})
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    fetched: list[str] = []
    monkeypatch.setattr(nltk, "download", fetched.append)
    selection = select_suite("qwen2-instruct", datasets=tmp_path, manager=manager)
    (ifeval,) = (s for s in selection.scores([]) if s.benchmark == "IFEval")
    assert "python -m nltk.downloader punkt_tab" in ifeval.absent
    assert fetched == []
