"""Whole runs in this process: what is watched and written besides the model."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.errors import BackendError, MissingExtra
from qwen2kit.train import run, trackers
from qwen2kit.train.profiling import StepProfiler
from tests.parallel.runs import checkpoints, records, tiny

pytest.importorskip("torch")


def test_what_a_run_leaves_to_look_at(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    config = tiny(
        "train.steps=5", "logging.tensorboard=true", "logging.profile_steps=[2, 3]",
        "logging.plot=true",
    )  # fmt: skip
    result = run.start(config, run_dir=tmp_path / "run")
    assert result.status == "finished"
    steps = [r for r in records(tmp_path / "run") if r["event"] == "step"]
    assert {
        "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "seconds",
        "data_seconds", "eta_seconds",
    } <= steps[0].keys()  # fmt: skip
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = {point.step: point.value for point in events.Scalars("train/loss")}
    assert points == {r["step"]: pytest.approx(r["loss"], rel=1e-6) for r in steps}
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    document = json.loads(gzip.decompress(trace.read_bytes()))
    assert len(document["traceEvents"]) > 100
    assert "data:image/png;base64," in (tmp_path / "run" / "report.html").read_text()


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    config = tiny(
        "train.steps=4", "checkpoint.every=0", "checkpoint.every_minutes=1e-9", "checkpoint.keep=9"
    )
    run.start(config, run_dir=tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [1, 2, 3, 4]


def test_nothing_appears_if_a_tracker_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"qwen2kit\[wandb\]"):
        run.start(tiny("train.steps=1", "logging.wandb=x"), run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_backend_without_a_profiler_says_so(tmp_path: Path) -> None:
    model: Any = object()
    StepProfiler(model, tmp_path, None).starting(1)
    with pytest.raises(BackendError, match=r"remove logging\.profile_steps"):
        StepProfiler(model, tmp_path, (1, 2))


def test_a_finished_run_is_left_alone_and_another_recipe_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = run.start_or_resume(tiny("train.steps=2"), run_dir)
    again = run.start_or_resume(tiny("train.steps=2", "checkpoint.every=7"), run_dir)
    assert again == first
    with pytest.raises(ValueError, match=r"differs from that of .* in train\.steps; drop"):
        run.start_or_resume(tiny("train.steps=3"), run_dir)


def test_a_run_killed_after_its_last_step_evaluates_and_exports(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = run.start_or_resume(tiny("train.steps=3"), run_dir)
    weights = (run_dir / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "model")
    document = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(document | {"status": "running"}))
    again = run.start_or_resume(tiny("train.steps=3"), run_dir)
    assert (again.status, again.step, again.after) == ("finished", 3, first.after)
    assert (run_dir / "model" / "model.safetensors").read_bytes() == weights
