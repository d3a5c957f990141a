"""What the user types, and where it leads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from qwen2kit.errors import WeightError
from qwen2kit.weights.locate import latest_run, locate
from tests.tiny_checkpoint import write_tiny_checkpoint


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_directories_runs_and_gguf_files(tmp_path: Path) -> None:
    model = _touch(tmp_path / "m/config.json").parent
    assert locate(str(model)) == model
    run = _touch(tmp_path / "run/run.json").parent
    with pytest.raises(WeightError, match=r"no finished model.*--resume .+"):
        locate(str(run))
    _touch(run / "model/config.json")
    assert locate(str(run)) == run / "model"
    gguf = _touch(tmp_path / "g/a.gguf")
    assert locate(str(gguf)) == gguf
    assert locate(str(gguf.parent)) == gguf
    _touch(tmp_path / "g/b.gguf")
    with pytest.raises(WeightError, match="2 GGUF files; name one"):
        locate(str(gguf.parent))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _touch(tmp_path / "m/config.json")
    assert locate("~/m") == tmp_path / "m"


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/dir", "a/b/c", "org/file.gguf", ""])
def test_paths_that_do_not_exist_never_reach_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _forbidden)
    with pytest.raises(WeightError, match=r"no such file or directory|not a model directory"):
        locate(name)


def _forbidden(*args: Any, **kwargs: Any) -> str:
    raise AssertionError("the network was used")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"not \.gguf"):
        locate(str(_touch(tmp_path / "config.json")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightError, match="not a model directory"):
        locate(str(tmp_path / "empty"))


def test_a_hub_id_downloads_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        calls.append((model, allow_patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("Qwen/Qwen2-0.5B-Instruct") == tmp_path
    ((model, patterns),) = calls
    assert model == "Qwen/Qwen2-0.5B-Instruct"
    assert all(not pattern.endswith(("bin", "pt", "*", "py")) for pattern in patterns)


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("line one\nline two")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightError, match="hub cannot be reached") as caught:
        locate("org/name")
    assert "\n" not in str(caught.value)


def test_the_latest_run_is_the_newest_finished_one(tmp_path: Path) -> None:
    assert latest_run(tmp_path / "absent") is None
    assert latest_run(tmp_path) is None
    for age, name in ((300, "old"), (200, "new"), (100, "unfinished")):
        _touch(tmp_path / name / "run.json")
        if name != "unfinished":
            write_tiny_checkpoint(tmp_path / name / "model")
            stamp = 1_700_000_000 - age
            os.utime(tmp_path / name / "model/config.json", (stamp, stamp))
    assert latest_run(tmp_path) == tmp_path / "new"
