"""The loop's order and cadence with a scripted model, and the sinks it writes to."""

from __future__ import annotations

import json
import os
import signal
from math import inf
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.protocol import StepMetrics
from qwen2kit.data.corpus import collect
from qwen2kit.data.loader import Loader
from qwen2kit.data.row_source import PlannedRows, RowLayout, TableSource
from qwen2kit.errors import TrainingError
from qwen2kit.train.curve import plot_loss, sparkline
from qwen2kit.train.loop import Cadence, Progress, run_loop
from qwen2kit.train.metrics import JsonlSink, Sinks, read_records
from qwen2kit.train.signals import StopRequest


class Script:
    """Plays model, hooks and sink, and writes down what it is asked."""

    def __init__(self, stop: StopRequest | None = None, fail_at: int = -1) -> None:
        self.calls: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.stop, self.fail_at = stop, fail_at

    def train_step(self, batch: Any, lr: float, *, max_loss: float = inf) -> StepMetrics:
        self.rates.append(lr)
        step = len(self.rates)
        if step == self.fail_at:
            raise TrainingError("loss is nan")
        self.calls.append(f"step {step}")
        return StepMetrics(loss=1 / step, grad_norm=1, tokens=5, supervised_tokens=3)

    def save(self, progress: Progress) -> None:
        self.calls.append(f"save {progress.step}")

    def evaluate(self, progress: Progress) -> None:
        self.calls.append(f"eval {progress.step}")

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.stop is not None and record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def play(script: Script, cadence: Cadence, stop: StopRequest, step: int = 0) -> Progress:
    progress = Progress(step=step)
    corpus = collect([([1, 2, 3], [True] * 3)])
    rows = PlannedRows(corpus, RowLayout(seq_len=4, seed=0, pad_id=0))
    loader = Loader(TableSource(rows), batch_rows=1)
    run_loop(
        script,  # type: ignore[arg-type]
        loader,
        cadence,
        lambda index: index / 10,
        progress=progress,
        hooks=script,
        sink=script,
        stop=stop,
    )
    return progress


def test_checkpoints_come_before_evaluations_and_at_the_end() -> None:
    script = Script()
    cadence = Cadence(total=5, log_every=2, checkpoint_every=2, eval_every=2)
    progress = play(script, cadence, StopRequest())
    assert script.calls == [
        "step 1", "step 2", "save 2", "eval 2", "step 3", "step 4", "save 4", "eval 4",
        "step 5", "save 5",
    ]  # fmt: skip
    assert [record["step"] for record in script.records] == [2, 4, 5]
    assert script.rates == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert (progress.step, progress.tokens, progress.last_loss) == (5, 25, 0.2)


def test_continuing_uses_the_schedule_of_the_whole_run() -> None:
    script = Script()
    play(script, Cadence(total=5), StopRequest(), step=3)
    assert script.rates == [0.3, 0.4]
    assert script.calls == ["step 1", "step 2", "save 5"]


def test_a_signal_finishes_the_step_saves_and_stops() -> None:
    with StopRequest() as stop:
        script = Script(stop)
        progress = play(script, Cadence(total=9, eval_every=1), stop)
    assert stop.requested == "SIGTERM"
    assert progress.step == 3
    assert script.calls[-1] == "save 3"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_second_interrupt_interrupts_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_error_names_the_step() -> None:
    with pytest.raises(TrainingError, match="step 3: loss is nan"):
        play(Script(fail_at=3), Cadence(total=5), StopRequest())


def test_jsonl_survives_nan_crashes_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.keep_upto(-1)
    for step in range(1, 5):
        loss = float("nan") if step == 2 else 1.5
        Sinks([sink]).write({"event": "step", "step": step, "loss": loss})
    with path.open("a") as file:
        file.write('{"event": "st')
    records = list(read_records(path))
    assert [r["loss"] for r in records] == [1.5, None, 1.5, 1.5]
    JsonlSink(path).keep_upto(2)
    assert [r["step"] for r in read_records(path)] == [1, 2]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 1 is not JSON"):
        list(read_records(path))


def test_sparkline_and_plot(tmp_path: Path) -> None:
    assert sparkline([]) == ""
    assert sparkline([3, 2, 1, 0]) == "█▆▃▁"
    assert sparkline([1.0] * 5) == "▁▁▁▁▁"
    assert len(sparkline(list(range(1000)), width=20)) == 20
    pytest.importorskip("matplotlib")
    records: list[dict[str, Any]] = [
        {"event": "step", "step": i, "loss": None if i == 3 else 1 / i} for i in range(1, 9)
    ]
    records.append({"event": "eval", "step": 8, "loss": 0.2})
    assert plot_loss(tmp_path / "loss.png", records, "x")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
