"""The loop's order and cadence with a scripted model, and the sinks it writes to."""

from __future__ import annotations

import json
import os
import signal
from base64 import b64encode
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.protocol import StepMetrics
from qwen2kit.config.train_tree import RewindSpikes, SkipSpikes, TrainConfig
from qwen2kit.errors import TrainingError
from qwen2kit.train.curve import plot_run, sparkline
from qwen2kit.train.guard import Guard
from qwen2kit.train.loop import Cadence, Progress, run_loop
from qwen2kit.train.metrics import JsonlSink, Sinks, read_records
from qwen2kit.train.pace import Pace
from qwen2kit.train.report import write_report
from qwen2kit.train.signals import StopRequest


class Script:
    """Plays model, loader, hooks and sink, and writes down what it is asked.

    Args:
        losses: of the steps, by the number of the batch; ``1 / number`` for the others.
    """

    def __init__(
        self,
        stop: StopRequest | None = None,
        fail_at: int = -1,
        losses: dict[int, float] | None = None,
    ) -> None:
        self.calls: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.stop, self.fail_at = stop, fail_at
        self.losses = losses or {}
        self.saved = 0

    def next_batch(self) -> int:
        return len(self.rates) + 1

    def train_step(self, batch: int, lr: float, *, max_loss: float = inf) -> StepMetrics:
        self.rates.append(lr)
        if batch == self.fail_at:
            raise TrainingError("out of memory")
        self.calls.append(f"step {batch}")
        loss = self.losses.get(batch, 1 / batch)
        return StepMetrics(
            loss=loss, grad_norm=1, tokens=5, supervised_tokens=3, skipped=not loss <= max_loss
        )

    def starting(self, step: int) -> None:
        pass

    def attend(self, stop_requested: bool) -> bool:
        return stop_requested

    def save(self, progress: Progress) -> None:
        self.calls.append(f"save {progress.step}")
        self.saved = progress.step

    def finish(self) -> None:
        self.calls.append("finish")

    def rewind(self, progress: Progress, loss: float) -> None:
        self.calls.append(f"rewind {progress.step + 1}")
        progress.step = self.saved

    def evaluate(self, progress: Progress) -> None:
        self.calls.append(f"eval {progress.step}")

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.stop is not None and record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def play(
    script: Script,
    cadence: Cadence,
    stop: StopRequest | None = None,
    step: int = 0,
    train: TrainConfig | None = None,
) -> Progress:
    progress = Progress(step=step)
    play_phase(script, cadence, stop or StopRequest(), progress, train)
    return progress


def play_phase(
    script: Script,
    cadence: Cadence,
    stop: StopRequest,
    progress: Progress | None = None,
    train: TrainConfig | None = None,
) -> bool:
    return run_loop(
        script,  # type: ignore[arg-type]
        script,  # type: ignore[arg-type]
        cadence,
        lambda index: index / 10,
        progress=progress or Progress(),
        guard=Guard(train or TrainConfig(steps=9)),
        hooks=script,
        sink=script,
        stop=stop,
        pace=Pace(),
    )


def test_checkpoints_come_before_evaluations_and_at_the_end() -> None:
    script = Script()
    cadence = Cadence(total=5, log_every=2, checkpoint_every=2, eval_every=2)
    progress = play(script, cadence)
    assert script.calls == [
        "step 1", "step 2", "save 2", "eval 2", "step 3", "step 4", "save 4", "eval 4",
        "step 5", "save 5", "finish",
    ]  # fmt: skip
    assert [record["step"] for record in script.records] == [2, 4, 5]
    assert script.rates == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert (progress.step, progress.tokens, progress.last_loss) == (5, 25, 0.2)


def test_continuing_uses_the_schedule_of_the_whole_run() -> None:
    script = Script()
    play(script, Cadence(total=5), step=3)
    assert script.rates == [0.3, 0.4]
    assert script.calls == ["step 1", "step 2", "save 5", "finish"]


def test_a_phase_ends_with_a_checkpoint_and_its_records_look_ahead() -> None:
    script = Script()
    progress = play(script, Cadence(total=9, last=2, log_every=2, eval_every=2))
    assert script.calls == ["step 1", "step 2", "save 2", "eval 2", "finish"]
    assert progress.step == 2
    assert script.records[-1]["eta_seconds"] >= 3 * script.records[-1]["seconds"] - 0.1


def test_a_signal_finishes_the_step_saves_and_stops() -> None:
    with StopRequest() as stop:
        script = Script(stop)
        progress = play(script, Cadence(total=9, eval_every=1), stop)
    assert stop.requested == "SIGTERM"
    assert progress.step == 3
    assert script.calls[-2:] == ["save 3", "finish"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("last", "total", "stopped"), [(3, 9, True), (3, 3, False), (5, 9, True)])
def test_a_signal_at_the_end_of_a_phase_stops_the_run(last: int, total: int, stopped: bool) -> None:
    with StopRequest() as stop:
        script = Script(stop)
        assert play_phase(script, Cadence(total=total, last=last), stop) == stopped
    assert script.calls[-2:] == ["save 3", "finish"]


def test_a_later_interrupt_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        for _ in range(2):  # from the terminal and from the launcher
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        monkeypatch.setattr(stop, "_since", stop._since - 2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_error_names_the_step() -> None:
    with pytest.raises(TrainingError, match="step 3: out of memory"):
        play(Script(fail_at=3), Cadence(total=5))


def test_a_loss_that_is_not_finite_stops_the_run_after_its_checkpoint_is_complete() -> None:
    script = Script(losses={3: nan})
    with pytest.raises(TrainingError, match=r"step 3: loss is nan .* train.non_finite=skip"):
        play(script, Cadence(total=5, checkpoint_every=2))
    assert script.calls[-2:] == ["step 3", "finish"]
    script = Script(losses={3: nan})
    progress = play(script, Cadence(total=5), train=TrainConfig(steps=5, non_finite="skip"))
    assert (progress.step, progress.skipped) == (5, 1)
    endless = Script(losses=dict.fromkeys(range(2, 99), nan))
    train = TrainConfig(steps=5, non_finite="skip", max_skipped=2)
    with pytest.raises(TrainingError, match="step 4: 3 steps in a row were skipped"):
        play(endless, Cadence(total=5), train=train)


def test_a_spike_is_skipped() -> None:
    script = Script(losses={7: 100.0})
    spike = SkipSpikes(window=4, factor=8.0)
    progress = play(script, Cadence(total=9), train=TrainConfig(steps=9, spike=spike))
    assert (progress.step, progress.skipped) == (9, 1)
    assert [record["skipped"] for record in script.records].index(True) == 6


def test_a_spike_rewinds_to_the_checkpoint_and_not_for_ever() -> None:
    train = TrainConfig(steps=9, spike=RewindSpikes(window=4, factor=8.0, max_rewinds=2))
    script = Script(losses={7: 100.0, 8: inf})
    progress = play(script, Cadence(total=9, checkpoint_every=2), train=train)
    assert progress.step == 9
    assert [call for call in script.calls if call.startswith(("save", "rewind"))] == [
        "save 2", "save 4", "save 6", "rewind 7", "rewind 7", "save 8", "save 9",
    ]  # fmt: skip
    assert script.rates[6:9] == [0.6, 0.6, 0.6]  # the schedule goes back too
    endless = Script(losses=dict.fromkeys(range(7, 99), 100.0))
    with pytest.raises(TrainingError, match=r"step 7: loss is 100.0000 .*max_rewinds=2 is used up"):
        play(endless, Cadence(total=9, checkpoint_every=2), train=train)


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
    with pytest.raises(TrainingError, match="line 1 is damaged; remove that line"):
        list(read_records(path))


def test_a_rewind_drops_the_records_it_makes_void(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(1, 6):
        sink.write({"event": "step", "step": step})
    sink.write({"event": "rewind", "step": 3, "from_step": 6})
    sink.write({"event": "step", "step": 3})
    records = [(r["event"], r["step"]) for r in read_records(path)]
    assert records == [("step", 1), ("step", 2), ("rewind", 3), ("step", 3)]


def test_sparkline_and_plot(tmp_path: Path) -> None:
    assert sparkline([]) == ""
    assert sparkline([3, 2, 1, 0]) == "█▆▃▁"
    assert sparkline([1.0] * 5) == "▁▁▁▁▁"
    assert len(sparkline(list(range(1000)), width=20)) == 20
    pytest.importorskip("matplotlib")
    steps = [
        {
            "event": "step",
            "step": i,
            "loss": None if i == 3 else 1 / i,
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        for i in range(1, 9)
    ]
    picture = tmp_path / "loss.png"
    assert plot_run(picture, [*steps, {"event": "eval", "step": 8, "loss": 0.2}], "x")
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "report.html"
    figures = {"tokens": 12, "after": {"loss": 0.2}, "signal": None}
    write_report(page, picture, figures, {"config": {"name": "<tiny>"}})
    text = page.read_text()
    assert "<th>after loss</th><td>0.2</td>" in text
    assert b64encode(picture.read_bytes()).decode() in text
    assert "&lt;tiny&gt;" in text
    assert "<tiny>" not in text
    assert "http" not in text  # nothing is loaded from elsewhere
