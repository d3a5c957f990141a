"""The training loop: order, cadence and bookkeeping. The backend owns what a step is.

Every process runs this loop. The loader hands out the rows of this process, ``train_step`` returns
figures of the global batch, and whatever depends on one process alone (a signal, a clock, a
finished file) is agreed upon before anyone acts on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Protocol

from qwen2kit.backend.processes import Processes, SingleProcess
from qwen2kit.backend.protocol import TrainableModel
from qwen2kit.backend.values import StepMetrics
from qwen2kit.data.loader import Batches
from qwen2kit.errors import TrainingError
from qwen2kit.train.guard import Guard
from qwen2kit.train.metrics import Record, Sink
from qwen2kit.train.pace import Pace, Timer
from qwen2kit.train.signals import Stopped, StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """When things happen.

    Attributes:
        total: number of steps of the whole run.
        last: step after which the loop ends (saving); ``total`` if None.
        log_every, checkpoint_every, eval_every: in steps; 0 is never.
        checkpoint_minutes: longest time between checkpoints; 0 is any.
    """

    total: int
    last: int | None = None
    log_every: int = 1
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    eval_every: int = 0

    @property
    def end(self) -> int:
        """The step after which the loop ends."""
        return self.total if self.last is None else self.last


@dataclass(slots=True)
class Progress:
    """How far a run is. ``tokens`` and ``skipped`` count from its very first step."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    last_loss: float | None = field(default=None)


class Hooks(Protocol):
    """What the loop calls back. All methods are collective."""

    def starting(self, step: int) -> None:
        """Step number ``step`` (from 1) comes next."""
        ...

    def attend(self, stop_requested: bool) -> bool:
        """Called once per step: look after a checkpoint in flight; whether any process was asked
        to stop."""
        ...

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint."""
        ...

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete."""
        ...

    def rewind(self, progress: Progress, loss: float) -> None:
        """Back to the newest checkpoint; ``progress`` follows, the data does not."""
        ...

    def evaluate(self, progress: Progress) -> None:
        """Measure on held-out data. Raises Stopped if a stop is requested meanwhile."""
        ...


def run_loop(
    model: TrainableModel,
    loader: Batches,
    cadence: Cadence,
    learning_rate: Callable[[int], float],
    *,
    progress: Progress,
    guard: Guard,
    hooks: Hooks,
    sink: Sink,
    stop: StopRequest,
    pace: Pace,
    processes: Processes | None = None,
) -> bool:
    """Train from ``progress.step`` to the end of ``cadence`` or until ``stop`` is requested.

    Returns whether it was, with steps of the run left to do.

    A checkpoint is always begun before an evaluation, and complete when the loop ends. An
    evaluation that a stop request ends is left to the resumed run.

    Raises:
        TrainingError: the guard gives up (naming the step), or a checkpoint cannot be saved.
        PeerError: another process failed.
    """
    timer = Timer(cadence.checkpoint_minutes, processes or SingleProcess())
    stopping = False
    while progress.step < cadence.end and not stopping:
        hooks.starting(progress.step + 1)
        started = perf_counter()
        batch = loader.next_batch()
        waited = perf_counter() - started
        lr = learning_rate(progress.step)
        try:
            metrics = model.train_step(batch, lr, max_loss=guard.limit())
        except TrainingError as error:
            raise TrainingError(f"step {progress.step + 1}: {error}") from error
        if _must_rewind(guard, metrics, progress, hooks):
            hooks.rewind(progress, metrics.loss)
            continue
        _advance(progress, metrics)
        pace.step(metrics.tokens, perf_counter() - started, waited)
        if _due(progress.step, cadence.log_every) or progress.step == cadence.end:
            sink.write(_record(progress, metrics, lr, pace, cadence.total))
        stopping = hooks.attend(stop.requested is not None)
        ending = stopping or progress.step == cadence.end
        saving = ending or _due(progress.step, cadence.checkpoint_every) or timer.due()
        if saving:
            hooks.save(progress)
            timer.reset()
        last = progress.step == cadence.total  # which is evaluated anyway, before the export
        if not stopping and not last and _due(progress.step, cadence.eval_every):
            stopping = _is_stopped_by_then(hooks, progress, saved=saving)
    hooks.finish()
    return stopping and progress.step < cadence.total


def _is_stopped_by_then(hooks: Hooks, progress: Progress, *, saved: bool) -> bool:
    """Evaluate; whether a stop request ended that, and the step is being saved then."""
    try:
        hooks.evaluate(progress)
    except Stopped:
        if not saved:
            hooks.save(progress)
        return True
    return False


def _must_rewind(guard: Guard, metrics: StepMetrics, progress: Progress, hooks: Hooks) -> bool:
    try:
        return guard.must_rewind(metrics)
    except TrainingError as error:
        hooks.finish()
        raise TrainingError(f"step {progress.step + 1}: {error}") from error


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _advance(progress: Progress, metrics: StepMetrics) -> None:
    progress.step += 1
    progress.tokens += metrics.tokens
    progress.skipped += metrics.skipped
    if isfinite(metrics.loss):
        progress.last_loss = metrics.loss


def _record(progress: Progress, metrics: StepMetrics, lr: float, pace: Pace, total: int) -> Record:
    return {
        "event": "step",
        "step": progress.step,
        "loss": metrics.loss,
        "lr": lr,
        "grad_norm": metrics.grad_norm,
        "tokens": progress.tokens,
        "supervised_tokens": metrics.supervised_tokens,
        "skipped": metrics.skipped,
        "memory_bytes": metrics.peak_memory_bytes,
        **pace.figures(total - progress.step),
    }
