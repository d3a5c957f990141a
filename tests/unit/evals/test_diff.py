"""Sample-by-sample comparison of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.diff import diff_runs
from qwen2kit_evals.run import evaluate
from qwen2kit_evals.stored_run import StoredRun, read_run
from qwen2kit_evals.tasks import select_tasks
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.evals.reference_lm import load_reference
from tests.unit.evals.stored_runs import sample, write_run


@pytest.fixture(scope="module")
def runs(
    tiny: Path, task_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StoredRun, StoredRun]:
    home = tmp_path_factory.mktemp("runs")
    write_tiny_checkpoint(home / "other", seed=7, scale=0.2)
    selection = select_tasks(
        ["tiny_choice", "tiny_rolling", "tiny_generate"], include_path=task_files, defaults=False
    )
    for name, model in (("a", tiny), ("b", home / "other")):
        evaluate(load_reference(model), selection, output=home / name)
    return read_run(home / "a"), read_run(home / "b")


def test_real_runs(runs: tuple[StoredRun, StoredRun]) -> None:
    first, second = runs
    diffs = {diff.task: diff for diff in diff_runs(first, second)}
    choice = diffs["tiny_choice"]
    assert (choice.logprobs, choice.texts, choice.prompts_differ) == (32, 0, 0)
    gaps = [
        abs(x[0][0] - y[0][0])
        for a, b in zip(first.samples["tiny_choice"], second.samples["tiny_choice"], strict=True)
        for x, y in zip(a["responses"], b["responses"], strict=True)
    ]
    assert choice.max_dlogp == pytest.approx(max(gaps))
    assert choice.mean_dlogp == pytest.approx(sum(gaps) / len(gaps))
    flipped = 0
    for row in choice.metrics:
        scores = [[s["metrics"][row.metric] for s in run.samples["tiny_choice"]] for run in runs]
        assert (row.first, row.second) == tuple(sum(s) / 8 for s in scores)
        flips = {i: y > x for i, (x, y) in enumerate(zip(*scores, strict=True)) if x != y}
        assert {flip.doc_id: flip.gained for flip in row.flips} == flips
        flipped += len(flips)
    assert {row.metric for row in choice.metrics} == {"acc", "acc_norm"}
    assert flipped
    assert diffs["tiny_rolling"].logprobs == 4
    assert diffs["tiny_generate"].texts == 8
    assert diffs["tiny_generate"].texts_differ > 0


def test_a_run_does_not_differ_from_itself(runs: tuple[StoredRun, StoredRun]) -> None:
    for diff in diff_runs(runs[0], runs[0]):
        assert (diff.max_dlogp, diff.texts_differ, diff.only_first) == (0, 0, 0)
        for row in diff.metrics:
            assert (row.difference.delta, row.flips) == (0, ())
            assert row.difference.p == 1


def test_runs_of_different_documents_and_prompts(tmp_path: Path) -> None:
    pair = [[-1.0, True], [-2.0, False]]
    first = [sample(i, {"acc": 1.0}, responses=pair) for i in range(3)]
    second = [sample(i, {"acc": 0.0}, responses=pair, prompt="other") for i in range(1, 5)]
    second[1]["doc_hash"] = "changed"
    write_run(tmp_path / "a", {"t": first})
    write_run(tmp_path / "b", {"t": second})
    (diff,) = diff_runs(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    assert (diff.only_first, diff.only_second, diff.prompts_differ) == (2, 3, 1)
    assert diff.logprobs == 0
    assert diff.metrics[0].documents == 1


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a directory of results"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"finish it with --resume {tmp_path}"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_run(tmp_path)
    a = read_run(write_run(tmp_path / "a", {"x": [sample(0, {"acc": 1}, responses=["t"])]}))
    b = read_run(write_run(tmp_path / "b", {"y": [sample(0, {"acc": 1}, responses=["t"])]}))
    with pytest.raises(ConfigError, match="no answered document in common"):
        diff_runs(a, b)
    (tmp_path / "a/samples_x.jsonl").write_text('{"doc_id"\n')
    with pytest.raises(DataError, match="line 1 is damaged"):
        _ = read_run(tmp_path / "a").samples
