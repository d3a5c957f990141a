"""Trackers, read back by the tools they are for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.config.load import load_recipe
from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import MissingExtra
from qwen2kit.train import trackers
from qwen2kit.train.trackers import Tracker, check_trackers, open_trackers


def recipe(*changes: str) -> RunConfig:
    return load_recipe("tiny", list(changes))


def step(number: int, loss: float | None) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "lr": 1e-3, "mfu": None, "tokens": 7}


def held_out(number: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "loss": loss, "exact_match": 0.5, "by_kind": {}}


def fill(tracker: Tracker, *records: dict[str, Any]) -> None:
    for record in records:
        tracker.write(record)
    tracker.close()


def one(config: RunConfig, run_dir: Path, at: int = 0) -> Tracker:
    notes: list[str] = []
    (tracker,) = open_trackers(config, run_dir, at, notes.append)
    assert notes == []
    return tracker


def test_tensorboard_reads_what_a_killed_resumed_and_rewound_run_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = recipe("logging.tensorboard=true")
    fill(one(config, tmp_path), held_out(0, 9.0), step(1, 3.0), step(2, 2.0), step(3, None))
    rewind = {"event": "rewind", "step": 4, "from_step": 5, "rewinds": 1}
    fill(one(config, tmp_path, at=1), step(2, 2.5), step(3, 1.5), step(4, 8.0), rewind, step(4, 1))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert points == [(1, 3.0), (2, 2.5), (3, 1.5), (4, 1.0)]
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/lr", "train/tokens", "train/rewinds",
        "held_out/loss", "held_out/exact_match",
    }  # fmt: skip
    assert "tensorflow" not in sys.modules


def test_mlflow_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = recipe("logging.mlflow=tiny-models", "train.lr=0.005")
    for losses in ({1: 3.0, 2: 2.0}, {2: 2.5}):
        tracker = one(config, tmp_path / "run")
        fill(tracker, *(step(number, loss) for number, loss in losses.items()))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiny-models")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["train.lr"] == "0.005"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0), (2, 2.5)]


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format that fits one block: crc32c, length, type 1."""
    assert len(data) < 32768
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        assert data[position + 6] == 1
        yield data[position + 7 : position + 7 + length]
        position += 7 + length


def logged_losses(file: Path) -> list[tuple[int, float]]:
    from wandb.proto import wandb_internal_pb2

    losses = []
    for data in leveldb_log(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if "train/loss" in values:
            losses.append((int(values["step"]), float(values["train/loss"])))
    return losses


def test_wandb_offline_writes_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fill(one(recipe("logging.wandb=tiny"), tmp_path), held_out(0, 9.0), step(1, 3.0), step(2, 2.0))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 300
    while len(losses := logged_losses(file)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of theirs writes it
    assert losses == [(1, 3.0), (2, 2.0)]


def test_an_absent_package_is_refused_before_anything_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers(recipe().logging)
    for name, change in {
        "tensorboard": "logging.tensorboard=true",
        "wandb": "logging.wandb=x",
        "mlflow": "logging.mlflow=x",
    }.items():
        with pytest.raises(MissingExtra, match=rf"qwen2kit\[{name}\]"):
            check_trackers(recipe(change).logging)


def test_a_tracker_that_fails_is_dropped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Down:
        def __init__(self, directory: Path, step: int) -> None:
            pass

        def write(self, record: object) -> None:
            calls.append("write")
            raise ConnectionError("the server\nis down")

        def close(self) -> None:
            calls.append("close")

    monkeypatch.setattr(trackers, "TensorBoard", Down)
    notes: list[str] = []
    (tracker,) = open_trackers(recipe("logging.tensorboard=true"), tmp_path, 0, notes.append)
    fill(tracker, step(1, 1.0), step(2, 1.0))
    assert calls == ["write"]
    assert notes == ["warning: a tracker failed and is left out from now on: the server is down"]
