"""Reading data from disk by its Hub name: from anywhere, offline, and undone afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from qwen2kit.errors import DataError
from qwen2kit_evals.local_data import LocalData, is_file_format, local_datasets, offline


def write_set(root: Path, name: str, layout: dict[str, dict[str, int]]) -> None:
    """A data set ``{config: {split: rows}}`` with its card."""
    home = root / name
    card = ["---", "configs:"]
    for config, splits in layout.items():
        (home / config).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            lines = (json.dumps({"text": f"{config} {split} {i}"}) for i in range(rows))
            (home / config / f"{split}.jsonl").write_text("\n".join(lines))
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (home / "README.md").write_text("\n".join([*card, "---", ""]))


@pytest.fixture
def data(tmp_path: Path) -> LocalData:
    write_set(tmp_path / "hub", "org/one", {"main": {"train": 3, "test": 2}})
    write_set(tmp_path / "hub", "org/two", {"a": {"test": 1}, "b": {"test": 1}})
    return LocalData(tmp_path / "hub")


def test_hub_names_read_from_disk(
    data: LocalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    original = datasets.load_dataset
    with local_datasets(data):
        loaded = datasets.load_dataset("org/one", name="main")
        assert datasets.load_dataset(path="org/two", name="b")["test"][0]["text"] == "b test 0"
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 2}
    assert datasets.load_dataset is original


def test_equal_names_elsewhere_and_edits_are_other_data(data: LocalData, tmp_path: Path) -> None:
    write_set(tmp_path / "copy", "org/one", {"main": {"train": 3, "test": 5}})

    def rows(where: LocalData) -> int:
        with local_datasets(where):
            return len(datasets.load_dataset("org/one", "main", split="test"))

    assert (rows(data), rows(LocalData(tmp_path / "copy"))) == (2, 5)
    file = data.root / "org" / "one" / "main" / "test.jsonl"
    file.write_text(json.dumps({"text": "only this"}))
    assert rows(data) == 1


def test_absent_names_do_not_reach_the_hub(data: LocalData) -> None:
    with local_datasets(data), pytest.raises(Exception, match=r"[oO]ffline|doesn't exist"):
        datasets.load_dataset("org/absent-everywhere")


def test_offline_is_switched_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with offline():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "HF_DATASETS_OFFLINE" not in os.environ


def test_configs_and_splits(data: LocalData) -> None:
    assert data.configs("org/two") == ("a", "b")
    assert set(data.splits("org/one", "main")) == {"train", "test"}
    assert set(data.splits("org/one", None)) == {"train", "test"}
    with pytest.raises(DataError, match="no config 'c'; present: a, b"):
        data.splits("org/two", "c")
    with pytest.raises(DataError, match="org/two cannot be read"):
        data.splits("org/two", None)


def test_names_cannot_leave_the_directory(data: LocalData) -> None:
    assert data.find("org/one") == data.root / "org/one"
    for name in ("org/absent", "../hub/org", "/etc", "org/../org/one", ""):
        assert data.find(name) is None


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such directory"):
        LocalData(tmp_path / "nowhere")


def test_file_formats_are_not_data_sets() -> None:
    assert is_file_format("json")
    assert is_file_format("parquet")
    assert not is_file_format("openai/gsm8k")
