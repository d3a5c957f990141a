"""The moving parts of one phase of a run, and what the loop calls back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2kit.adapters.base_mark import mark
from qwen2kit.backend.processes import Processes
from qwen2kit.backend.protocol import TrainableModel
from qwen2kit.errors import TrainingError
from qwen2kit.train.checkpoints import CheckpointStore
from qwen2kit.train.evaluate import Evaluator
from qwen2kit.train.guard import Guard
from qwen2kit.train.loop import Cadence, Progress, run_loop
from qwen2kit.train.metrics import Sink
from qwen2kit.train.pace import Pace
from qwen2kit.train.phases import Phase
from qwen2kit.train.profiling import StepProfiler
from qwen2kit.train.schedule import learning_rate
from qwen2kit.train.setup import RunData
from qwen2kit.train.signals import StopRequest
from qwen2kit.weights.checkpoint import Checkpoint


@dataclass(slots=True, kw_only=True)
class Held:
    """Held-out figures before training and the newest ones."""

    before: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, Any] = field(default_factory=dict)


class Session:
    """A phase of a run in memory.

    Args:
        phase: its recipe and its steps.
        total: steps of the whole run.
        profile_dir: folder for traces of the steps that the recipe wants recorded.
        go_on: raises Stopped if a process of the run was asked to stop (collective).

    Attributes:
        progress: step, tokens and skipped steps so far.
        guard: judges the steps.
        held: held-out figures.
        base_mark: of the weights it began with (`qwen2kit.adapters.base_mark`), None of fresh ones.
    """

    def __init__(
        self,
        phase: Phase,
        total: int,
        *,
        model: TrainableModel,
        data: RunData,
        evaluator: Evaluator,
        store: CheckpointStore,
        processes: Processes,
        sink: Sink,
        pace: Pace,
        profile_dir: Path,
        go_on: Callable[[], None],
    ) -> None:
        self.phase = phase
        self.total = total
        self.model = model
        self.data = data
        self.progress = Progress()
        self.guard = Guard(phase.config.train)
        self.held = Held()
        self.base_mark: str | None = None
        self._evaluator = evaluator
        self._store = store
        self._processes = processes
        self._sink = sink
        self._pace = pace
        self._go_on = go_on
        steps = phase.config.logging.profile_steps
        self._profiler = StepProfiler(model, profile_dir, steps)

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Initial weights: those of ``checkpoint``, or fresh ones by the recipe's seed."""
        if checkpoint is None:
            self.model.init(self.phase.config.train.seed)
        else:
            self.model.load(checkpoint.weights)
            self.base_mark = mark(checkpoint.weights)

    def adopt(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint's ``state`` was taken, possibly in the phase before this.

        Raises:
            TrainingError: the data is not what the run was started on, or the run has done more
                steps than it is to have.
        """
        if state["step"] > self.total:
            raise TrainingError(
                f"{state['step']} steps are done already, but the recipe now has {self.total}; "
                "raise train.steps or start a new run"
            )
        self.progress = Progress(state["step"], state["tokens"], state["skipped"], state["loss"])
        self.held.before = state["before"]
        self._restore_guard(state)
        if state["phase"] != self.phase.number:
            return
        if state["data"] != self._fingerprint:
            raise TrainingError(
                "the training data has changed since this run was started; restore the old files "
                "or start a new run"
            )
        self.data.train.restore(state["loader"])

    @property
    def finished(self) -> bool:
        """Whether every step of the run is done."""
        return self.progress.step == self.total

    def train(self, stop: StopRequest) -> bool:
        """Run the loop to the end of the phase; whether a stop request ended the run there."""
        config = self.phase.config
        try:
            return run_loop(
                self.model,
                self.data.train,
                Cadence(
                    total=self.total,
                    last=self.phase.last,
                    log_every=config.logging.every,
                    checkpoint_every=config.checkpoint.every,
                    checkpoint_minutes=config.checkpoint.every_minutes,
                    eval_every=config.eval.every,
                ),
                lambda step: learning_rate(
                    config.train.schedule, config.train.lr, step, self.total
                ),
                progress=self.progress,
                guard=self.guard,
                hooks=self,
                sink=self._sink,
                stop=stop,
                pace=self._pace,
                processes=self._processes,
            )
        except TrainingError:
            if self._processes.world == 1:  # with others, nobody knows who is still there
                self._store.finish()
            raise

    def starting(self, step: int) -> None:
        """Tell the profiler."""
        self._profiler.starting(step)

    def attend(self, stop_requested: bool) -> bool:
        """One round of votes per step; a second one only while a checkpoint is in flight."""
        if not self._processes.any(stop_requested or self._store.busy):
            self._store.publish()
            return False
        return self._processes.any(stop_requested) if self._store.saving else True

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint of everything that decides what the next step does."""
        state = {
            "phase": self.phase.number,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "loss": progress.last_loss,
            "guard": self.guard.state(),
            "loader": self.data.train.state(),
            "data": self._fingerprint,
            "before": self.held.before,
        }
        self._store.begin(progress.step, state, self.model.save_state)

    def finish(self) -> None:
        """Wait for the checkpoint in flight; write what was being recorded."""
        self._profiler.close()
        self._store.finish()

    def rewind(self, progress: Progress, loss: float) -> None:
        """Weights, optimizer and counts of the newest checkpoint; the data goes on from here."""
        self._store.finish()
        rewinds, spiked = self.guard.rewinds, progress.step + 1
        restored = self._store.restore(lambda path, state: self.model.restore_state(path))
        if restored is None:
            raise TrainingError(f"step {spiked}: loss is {loss:.4f}; no checkpoint to go back to")
        state = restored.state
        progress.step, progress.tokens = state["step"], state["tokens"]
        progress.skipped, progress.last_loss = state["skipped"], state["loss"]
        self._restore_guard(state)
        self.guard.rewinds = rewinds
        # Numbered as the first step that is done anew, so that it shares that step's fate.
        record = {"event": "rewind", "step": progress.step + 1, "from_step": spiked, "loss": loss}
        self._sink.write(record | {"rewinds": rewinds})

    def evaluate(self, progress: Progress) -> None:
        """Measure on held-out data and report it.

        Raises:
            Stopped: a stop is requested meanwhile; nothing is reported.
        """
        figures = self._evaluator.measure(self.model, self._go_on)
        if progress.step == 0:
            self.held.before = figures
        self.held.latest = figures
        if figures:
            seq_len = self.phase.config.seq_len
            record = {"event": "eval", "step": progress.step, "seq_len": seq_len, **figures}
            self._sink.write(record)

    def close(self) -> None:
        """Stop what loads data in the background."""
        self.data.close()

    def _restore_guard(self, state: dict[str, Any]) -> None:
        self.guard.restore(state["guard"])
        if state["phase"] != self.phase.number:
            self.guard.forget()  # losses on shorter rows are no measure

    @cached_property
    def _fingerprint(self) -> str:
        return self.data.train.fingerprint()
