"""``qwen2kit eval --nproc 2``: the scores of one process, and failures said once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval_tasks import write_tasks
from tests.run_cli import run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("team")
    write_tiny_checkpoint(home / "model")
    write_tasks(home / "tasks")
    return home


def evaluated(home: Path, output: str, *options: str) -> dict[str, object]:
    done = run_cli(
        "eval", home / "model", "--tasks", "tiny_choice,tiny_generate", "--backend", "torch",
        "--device", "cpu", "--include-path", home / "tasks", "--output", output, "--json", *options,
        cwd=home, env={"HF_DATASETS_CACHE": str(home / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, object] = json.loads(done.stdout)
    return document


def test_two_processes_score_as_one(home: Path) -> None:
    one, two = evaluated(home, "one"), evaluated(home, "two", "--nproc", "2")
    assert two["results"] == one["results"]
    for name in ("samples_tiny_choice.jsonl", "samples_tiny_generate.jsonl"):
        ours, theirs = (
            [json.loads(line) for line in (home / run / name).read_text().splitlines()]
            for run in ("two", "one")
        )
        assert [s["metrics"] for s in ours] == [s["metrics"] for s in theirs]
        if "generate" in name:
            assert [s["responses"] for s in ours] == [s["responses"] for s in theirs]
    logs = [
        (home / "two" / f).read_text().splitlines() for f in ("requests.jsonl", "requests-1.jsonl")
    ]
    keys = [json.loads(line)["key"] for log in logs for line in log]
    assert (
        len(keys)
        == len(set(keys))
        == len((home / "one" / "requests.jsonl").read_text().splitlines())
    )
    assert min(map(len, logs)) > len(keys) // 4
    assert not (home / "two" / "work").exists()


def test_a_failure_is_said_once_and_leaves_nothing(home: Path) -> None:
    done = run_cli(
        "eval", home / "model", "--tasks", "gsm8kk", "--backend", "torch", "--nproc", "2",
        "--output", "three", cwd=home,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown task 'gsm8kk'; did you mean gsm8k")
    assert done.stderr.count("\n") == 1
    assert not (home / "three").exists()
