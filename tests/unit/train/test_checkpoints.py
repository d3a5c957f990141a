"""Checkpoints: atomic, checked, pruned; damage and full disks."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from qwen2kit.errors import TrainingError, WeightError
from qwen2kit.train.checkpoints import CheckpointStore


def writer(text: str):  # type: ignore[no-untyped-def]
    return lambda directory: (directory / "model.bin").write_text(text)


def saved(tmp_path: Path, count: int = 3, keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    for step in range(1, count + 1):
        store.save(step * 10, {"value": step}, writer(f"weights {step}"))
    return store


def test_newest_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    store = saved(tmp_path)
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000030"]
    read: list[str] = []
    restored = store.restore(lambda d: read.append((d / "model.bin").read_text()))
    assert restored is not None
    assert read == ["weights 3"]
    assert (restored.state["step"], restored.state["value"]) == (30, 3)
    assert restored.warnings == ()
    assert not list(store.directory.glob(".*"))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", 2).restore(lambda d: None) is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: flip(d / "model.bin"),
        lambda d: (d / "model.bin").unlink(),
        lambda d: (d / "model.bin").write_text("weights"),
        lambda d: (d / "state.json").unlink(),
        lambda d: (d / "state.json").write_text('{"step": 30'),
        lambda d: (d / "state.json").write_text("[]"),
        lambda d: (d / "state.json").write_text(
            json.dumps({"schema_version": 99, "step": 30, "files": {}})
        ),
    ],
)
def test_a_damaged_newest_falls_back_with_a_warning(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = saved(tmp_path)
    damage(store.paths()[-1])
    restored = store.restore(lambda d: None)
    assert restored is not None
    assert restored.state["step"] == 20
    assert len(restored.warnings) == 1
    assert "step-00000030 is damaged" in restored.warnings[0]


def test_a_backend_that_refuses_the_newest_falls_back_too(tmp_path: Path) -> None:
    store = saved(tmp_path)

    def read(directory: Path) -> None:
        if directory.name.endswith("30"):
            raise WeightError("of another model")

    restored = store.restore(read)
    assert restored is not None
    assert restored.state["step"] == 20
    for path in store.paths():
        flip(path / "model.bin")
    with pytest.raises(TrainingError, match="no intact checkpoint"):
        store.restore(read)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES])
def test_a_failed_save_leaves_the_previous_ones(reason: int, tmp_path: Path) -> None:
    store = saved(tmp_path)

    def full(directory: Path) -> None:
        (directory / "model.bin").write_text("half")
        raise OSError(reason, "no luck")

    with pytest.raises(TrainingError) as caught:
        store.save(40, {}, full)
    message = str(caught.value)
    assert "step 40" in message
    assert "step-00000030 is intact" in message
    assert "\n" not in message
    assert ("no space left" in message) == (reason == errno.ENOSPC)
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000030"]
    assert not list(store.directory.glob(".*"))


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = saved(tmp_path)
    store.save(30, {"value": 9}, writer("again"))
    restored = store.restore(lambda d: None)
    assert restored is not None
    assert restored.state["value"] == 9


def test_a_partial_directory_of_a_crash_is_ignored_and_replaced(tmp_path: Path) -> None:
    store = saved(tmp_path)
    partial = store.directory / ".step-00000040.partial"
    partial.mkdir()
    (partial / "junk").write_text("x")
    assert len(store.paths()) == 2
    final = store.save(40, {}, writer("w"))
    assert sorted(path.name for path in final.iterdir()) == ["model.bin", "state.json"]
