"""Test questions planted in training files of every kind are found, and only those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2kit.config.data_tree import TextData
from qwen2kit.data.tokenize_job import tokenize
from qwen2kit.errors import ConfigError, DataError
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit_evals.contamination import (
    check_contamination,
    clean_scores,
    read_contamination,
    write_contamination,
)
from qwen2kit_evals.question_texts import question_texts
from qwen2kit_evals.stored_run import read_run
from qwen2kit_evals.tasks import select_tasks
from qwen2kit_evals.train_texts import train_texts
from tests.unit.evals.stored_runs import sample, write_run

QUESTIONS = [
    " ".join(f"{name}{i}" for i in range(20)) for name in ("alpha", "beta", "gamma", "delta")
]
LOUD = QUESTIONS[1].upper().replace(" ", ", ") + "!"  # same words, other symbols
PART = " ".join(QUESTIONS[2].split()[:13])


def test_planted_questions_are_found() -> None:
    train = ["nothing here", f"before {LOUD} after", f"{PART} {'x ' * 40}", QUESTIONS[3][:60]]
    (found,) = check_contamination(train, {"t": QUESTIONS})
    assert found.documents == 4
    assert found.ngram == (1, 2)
    assert found.lcs == found.window == (1, 2)
    quiet = check_contamination(["unrelated words"], {"t": QUESTIONS, "u": ["short"]})
    assert [task.ngram for task in quiet] == [(), ()]
    with pytest.raises(DataError, match="hold no text"):
        check_contamination([], {"t": QUESTIONS})


def test_every_kind_of_training_file(tiny: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "a.txt").write_text(f"one paragraph\n\n{QUESTIONS[0]}\n\nanother")
    turns = [{"role": "user", "content": LOUD}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    table = pyarrow.table({"prompt": [QUESTIONS[2]], "response": ["no"], "n": [1]})
    parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(QUESTIONS[3])
    tokenize(
        TextData(paths=(str(tmp_path / "d.txt"),)), open_checkpoint(tiny).tokenizer(),
        "pretrain", tmp_path / "shards", workers=1, shard_bytes=1 << 20, progress=lambda done: None,
    )  # fmt: skip
    paths = [str(tmp_path / name) for name in ("a.txt", "*.jsonl", "c.parquet", "shards")]
    for count, expected in ((1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (4, (0, 1, 2, 3))):
        (found,) = check_contamination(train_texts(paths[:count], str(tiny)), {"t": QUESTIONS})
        assert found.window == expected
    with pytest.raises(ConfigError, match="add --tokenizer MODEL"):
        train_texts(paths, None)
    with pytest.raises(DataError, match="no file matches"):
        train_texts([str(tmp_path / "nowhere.txt")], None)


def test_texts_are_question_and_answer(task_files: Path) -> None:
    selection = select_tasks(
        ["tiny_choice", "tiny_generate"], include_path=task_files, defaults=False
    )
    texts = question_texts(selection)
    assert len(texts["tiny_choice"]) == len(texts["tiny_generate"]) == 8
    assert texts["tiny_choice"][1].split()[-6:] == ["mat", "and?", "dog", "on", "the", "mat"]
    assert texts["tiny_generate"][2].split() == ["sat", "on", "the", "mat", "and", "the?", "sat"]


def test_scores_without_the_contaminated(tmp_path: Path) -> None:
    rights = [1.0, 0.0, 1.0, 0.0, 0.0]
    samples = [sample(i, {"acc": right}, responses=["t"]) for i, right in enumerate(rights)]
    run = read_run(write_run(tmp_path / "run", {"t": samples}))
    found = check_contamination([QUESTIONS[0], QUESTIONS[2]], {"t": [*QUESTIONS, "five"]})
    write_contamination(found, tmp_path / "c.json", train=["x"])
    assert read_contamination(tmp_path / "c.json") == found
    (score,) = clean_scores(run, found)
    assert (score.documents, score.contaminated) == (5, 2)
    assert (score.score_all, score.score_clean, score.score_contaminated) == (0.4, 0.0, 1.0)
    assert score.low == score.high == pytest.approx(score.score_clean - score.score_all)
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(DataError, match="not a result of eval contamination"):
        read_contamination(tmp_path / "c.json")
