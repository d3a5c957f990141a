"""The moving parts of one run, and what the loop calls back: saving and evaluating."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2kit.backend.protocol import TrainableModel
from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import TrainingError
from qwen2kit.train.checkpoints import CheckpointStore
from qwen2kit.train.evaluate import Evaluator
from qwen2kit.train.loop import Cadence, Progress, run_loop
from qwen2kit.train.metrics import Sink
from qwen2kit.train.schedule import learning_rate
from qwen2kit.train.setup import Note, RunData
from qwen2kit.train.signals import StopRequest
from qwen2kit.weights.checkpoint import Checkpoint


@dataclass(slots=True, kw_only=True)
class Held:
    """Held-out figures before training and the newest ones."""

    before: dict[str, Any]
    latest: dict[str, Any]


class Session:
    """A run in memory.

    Attributes:
        progress: step, tokens and skipped steps so far.
        held: held-out figures.
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Path,
        model: TrainableModel,
        data: RunData,
        evaluator: Evaluator,
        total: int,
        sink: Sink,
    ) -> None:
        self.config = config
        self.model = model
        self.data = data
        self.total = total
        self.progress = Progress()
        self.held = Held(before={}, latest={})
        self._evaluator = evaluator
        self._store = CheckpointStore(checkpoints, config.checkpoint.keep)
        self._sink = sink

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Initial weights: those of ``checkpoint``, or fresh ones by the recipe's seed."""
        if checkpoint is None:
            self.model.init(self.config.train.seed)
        else:
            self.model.load(checkpoint.weights)

    def restore(self, note: Note) -> bool:
        """Continue from the newest intact checkpoint; False if the run has none yet.

        Raises:
            TrainingError: all are damaged, or the data is not what the run was started on.
        """
        restored = self._store.restore(self.model.restore_state)
        if restored is None:
            return False
        for warning in restored.warnings:
            note(f"warning: {warning}")
        state = restored.state
        if state["corpus"] != self._fingerprint:
            raise TrainingError(
                "the training data has changed since this run was started; restore the old files "
                "or start a new run"
            )
        self.data.train.restore(state["loader"])
        self.progress = Progress(state["step"], state["tokens"], state["skipped"], state["loss"])
        self.held.before = state["before"]
        note(f"resuming after step {self.progress.step} of {self.total} ({restored.path.name})")
        return True

    def train(self, stop: StopRequest) -> None:
        """Run the loop to its end or to a stop request."""
        train = self.config.train
        run_loop(
            self.model,
            self.data.train,
            Cadence(
                total=self.total,
                log_every=self.config.logging.every,
                checkpoint_every=self.config.checkpoint.every,
                eval_every=self.config.eval.every,
            ),
            lambda step: learning_rate(train.schedule, train.lr, step, self.total),
            progress=self.progress,
            hooks=self,
            sink=self._sink,
            stop=stop,
        )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of everything that decides what the next step does."""
        state = {
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "loss": progress.last_loss,
            "loader": self.data.train.state(),
            "corpus": self._fingerprint,
            "before": self.held.before,
        }
        self._store.save(progress.step, state, self._write)

    def _write(self, directory: Path) -> None:
        self.model.save_state(directory).wait()

    def evaluate(self, progress: Progress) -> None:
        """Measure on held-out data and report it."""
        figures = self._evaluator.measure(self.model)
        if progress.step == 0:
            self.held.before = figures
        self.held.latest = figures
        if figures:
            self._sink.write({"event": "eval", "step": progress.step, **figures})

    @cached_property
    def _fingerprint(self) -> str:
        return self.data.train.fingerprint()
