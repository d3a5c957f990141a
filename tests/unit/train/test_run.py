"""Whole runs in this process: what is watched and written besides the model."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import signal
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from rich.console import Console

from qwen2kit.adapters.base_mark import mark
from qwen2kit.adapters.directory import open_adapter
from qwen2kit.config.load import load_recipe
from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import (
    BackendError,
    ConfigError,
    DataError,
    MissingExtra,
    TrainingError,
    WeightError,
)
from qwen2kit.train import export, exporting, run, trackers
from qwen2kit.train.checkpoints import CheckpointStore
from qwen2kit.train.evaluate import Evaluator
from qwen2kit.train.loop import Progress
from qwen2kit.train.metrics import JsonlSink
from qwen2kit.train.profiling import StepProfiler
from qwen2kit.train.run_dir import fresh_directory
from qwen2kit.train.session import Session
from qwen2kit.weights.checkpoint import open_checkpoint
from tests.parallel.runs import checkpoints, records, tiny
from tests.tiny_checkpoint import write_tiny_checkpoint

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
    evals = [r["step"] for r in records(run_dir) if r["event"] == "eval"]
    assert evals == [0, 3], "the last one is not there twice"
    assert (run_dir / "model" / "model.safetensors").read_bytes() == weights


def test_damage_in_a_run_directory_is_named(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", tiny("train.steps=2")
    run.start(tiny("train.steps=1"), run_dir=run_dir)
    metrics, origin = run_dir / "metrics.jsonl", run_dir / "start" / "config.json"
    good = metrics.read_bytes(), origin.read_bytes()
    origin.write_bytes(good[1][:100])
    with pytest.raises(ConfigError, match=r"start/config\.json: not valid JSON"):
        run.resume(run_dir, config=config, allow_changes=True)
    origin.write_bytes(good[1])
    for line in (b"\xff{\n", b"{}\n", b"3\n", b'{"step": "x", "event": "step"}\n'):
        metrics.write_bytes(line + good[0])
        with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 1 is damaged; remove"):
            run.resume(run_dir, config=config, allow_changes=True)
    metrics.write_bytes(good[0] + b"\0\0\xff")  # the last block before a power failure
    assert run.resume(run_dir, config=config, allow_changes=True).step == 2


def test_starting_again_is_said(tmp_path: Path) -> None:
    run.start(tiny("train.steps=1"), run_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    screen = Console(file=io.StringIO(), width=200)
    config = tiny("train.steps=2")
    run.resume(tmp_path / "run", config=config, allow_changes=True, console=screen)
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "run/checkpoints: starting again from step 0" in said


def test_a_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    import fcntl

    run_dir = tmp_path / "run"
    run.start(tiny("train.steps=1"), run_dir=run_dir)
    descriptor = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(TrainingError, match="is being trained by another process"):
        run.start_or_resume(tiny("train.steps=1"), run_dir)
    with pytest.raises(TrainingError, match="is being trained by another process"):
        run.resume(run_dir, config=tiny("train.steps=2"), allow_changes=True)
    os.close(descriptor)
    assert (run_dir / "run.json").read_bytes() == before


def test_runs_of_the_same_second_have_a_directory_each(tmp_path: Path) -> None:
    config = tiny(f"output_dir={tmp_path}")
    found = {fresh_directory(config) for _ in range(5)}
    assert len(found) == 5
    assert all(path.is_dir() for path in found)


def test_no_change_is_allowed_that_would_change_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run.start(tiny("train.steps=3"), run_dir=run_dir)
    with pytest.raises(ConfigError, match=r"model already, which model\.hidden_size, model\.rope"):
        run.resume(
            run_dir,
            config=tiny("train.steps=4", "model.hidden_size=64", "model.rope_theta=5.0"),
            allow_changes=True,
        )
    with pytest.raises(TrainingError, match="3 steps are done already, but the recipe now has 2"):
        run.resume(run_dir, config=tiny("train.steps=2"), allow_changes=True)


def test_how_often_is_measured_may_change_on_the_way(tmp_path: Path) -> None:
    config = tiny("train.steps=3", "eval.every=1")
    run_dir = tmp_path / "run"
    run.start_or_resume(config, run_dir)
    document = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(document | {"status": "running"}))
    assert run.resume(run_dir, config=run.recipe_of(run_dir, None, ["eval.every=0"])).step == 3


def test_an_attempt_that_fails_does_not_change_the_recipe_of_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run.start(tiny("train.steps=2"), run_dir=run_dir)
    with pytest.raises(DataError, match="do not fit seq_len=32"):
        run.resume(run_dir, config=tiny("train.steps=4", "seq_len=32"), allow_changes=True)
    assert run.recipe_of(run_dir) == tiny("train.steps=2")
    assert run.resume(run_dir, config=tiny("train.steps=4"), allow_changes=True).step == 4
    assert run.recipe_of(run_dir) == tiny("train.steps=4")


def test_a_missing_base_is_no_damage_of_a_checkpoint(tmp_path: Path) -> None:
    run_dir, base, moved = (tmp_path / name for name in ("run", "base", "moved"))
    write_tiny_checkpoint(base)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "c.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 8)

    def lora(*changes: str) -> RunConfig:
        return load_recipe(
            "lora",
            [
                f"model.checkpoint={base}", f"data.paths=['{tmp_path / 'c.jsonl'}']",
                "data.format.kind=messages", "seq_len=64", "train.batch_rows=1",
                "train.micro_batch_rows=1", "eval.fraction=0.0", "cpu_threads=1",
                "logging.plot=false", *changes,
            ],
        )  # fmt: skip

    run.start(lora("train.steps=1"), run_dir=run_dir)
    base.rename(moved)
    with pytest.raises(WeightError, match=r"^\S*base: no such file"):
        run.resume(run_dir, config=lora("train.steps=2"), allow_changes=True)
    config = lora("train.steps=2", f"model.checkpoint={moved}")
    assert run.resume(run_dir, config=config, allow_changes=True).step == 2
    assert open_adapter(run_dir / "model").base_mark == mark(open_checkpoint(moved).weights)


def test_a_model_that_does_not_fit_the_disk_is_a_failed_run_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, config = tmp_path / "run", tiny("train.steps=2")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "export_model", full)
        with pytest.raises(TrainingError, match=r"cannot write .*run/model: no space left on the"):
            run.start(config, run_dir=run_dir)
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"
    assert run.start_or_resume(config, run_dir).status == "finished"


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("train.steps=6", "checkpoint.every=2", "eval.every=2")
    run.start(config, run_dir=tmp_path / "whole")
    evaluate = Session.evaluate

    def killed(session: Session, progress: Progress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt
        evaluate(session, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "evaluate", killed)
        patch.setattr(CheckpointStore, "begin", _at_once(CheckpointStore.begin))
        with pytest.raises(KeyboardInterrupt):
            run.start(config, run_dir=tmp_path / "killed")
    for _ in range(2):  # once it is there, it is not made again
        run.start_or_resume(config, tmp_path / "killed")
        found, expected = (
            [(r["step"], r["loss"]) for r in records(tmp_path / name) if r["event"] == "eval"]
            for name in ("killed", "whole")
        )
        assert found == expected


LOSS = "qwen2kit_torch.train.model:TorchTrainableModel.loss"
WRITE = "qwen2kit.weights.safetensors_write:SafetensorsWriter.write"


def stopping_at(patch: pytest.MonkeyPatch, place: str, call: int) -> None:
    """Send SIGTERM to this process when ``place`` is called for the ``call``-th time."""
    owner, _, name = place.rpartition(".")
    original, calls = resolve_name(place), count(1)

    def called(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    patch.setattr(resolve_name(owner), name, called)


@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        (LOSS, 1, 0),  # the first evaluation, of three batches
        (LOSS, 4, 3),  # one on the way, after a step without a checkpoint
        (LOSS, 7, 6),  # the last one
        (WRITE, 1, 6),  # the model
    ],
)
def test_a_signal_ends_evaluation_and_export_and_a_resume_makes_them(
    place: str, call: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(
        "train.steps=6", "checkpoint.every=0", "eval.every=3", "eval.max_rows=12",
    )  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run.start(config, run_dir=whole)
    with monkeypatch.context() as patch:
        stopping_at(patch, place, call)
        result = run.start(config, run_dir=stopped)
    assert (result.status, result.signal, result.step) == ("stopped", "SIGTERM", step)
    assert json.loads((stopped / "run.json").read_text())["status"] == "stopped"
    assert checkpoints(stopped) == ([step] if step else [])
    assert not list(stopped.glob("*model*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    evaluations = count()
    with monkeypatch.context() as patch:
        measure = Evaluator.measure
        patch.setattr(Evaluator, "measure", lambda *args: (next(evaluations), measure(*args))[1])
        assert run.start_or_resume(config, stopped).status == "finished"
    assert next(evaluations) == {0: 3, 3: 2, 6: 1}[step] - (place == WRITE)
    same = [
        [(r["event"], r["step"], r["loss"]) for r in records(directory)]
        for directory in (whole, stopped)
    ]
    assert same[0] == same[1]
    model = "model/model.safetensors"
    assert (whole / model).read_bytes() == (stopped / model).read_bytes()
    assert run.start_or_resume(config, stopped).after == run.start_or_resume(config, whole).after


def test_the_last_evaluation_is_made_again_if_another_is_wanted(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", tiny("train.steps=2")
    run.start(config, run_dir=run_dir)
    changed = tiny("train.steps=2", "eval.max_rows=1")
    again = run.resume(run_dir, config=changed, allow_changes=True)
    losses = [r["loss"] for r in records(run_dir) if (r["event"], r["step"]) == ("eval", 2)]
    assert losses == [again.after["loss"]]


def test_a_model_that_is_replaced_is_never_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run.start(tiny("train.steps=1"), run_dir=run_dir)
    before = sorted(path.name for path in (run_dir / "model").iterdir())
    removed: list[list[str]] = []
    remove = shutil.rmtree

    def watched(path: Path, *args: Any, **options: Any) -> None:
        model = run_dir / "model"
        assert Path(path) != model
        if model.exists():
            removed.append(sorted(file.name for file in model.iterdir()))
        remove(path, *args, **options)

    monkeypatch.setattr(export.shutil, "rmtree", watched)
    run.resume(run_dir, config=tiny("train.steps=2"), allow_changes=True)
    assert all(names == before for names in removed)
    assert [path.name for path in run_dir.glob(".*")] == []


def _at_once(begin: Any) -> Any:
    def save(store: CheckpointStore, *args: Any) -> None:
        begin(store, *args)
        store.finish()

    return save


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_names_the_file_of_the_figures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"cannot write .*\.jsonl at step 3: no space left"):
        sink.write({"event": "step", "step": 3})
