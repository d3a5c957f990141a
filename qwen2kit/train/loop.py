"""The training loop: order, cadence and bookkeeping. The backend owns what a step is.

Nothing here knows about ranks or micro-batches: the loader hands out this rank's rows, and
``train_step`` returns figures of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Protocol

from qwen2kit.backend.protocol import StepMetrics, TrainableModel
from qwen2kit.data.loader import Loader
from qwen2kit.errors import TrainingError
from qwen2kit.train.metrics import Record, Sink
from qwen2kit.train.signals import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """When things happen.

    Attributes:
        total: number of steps.
        log_every, checkpoint_every, eval_every: in steps; 0 is never.
    """

    total: int
    log_every: int = 1
    checkpoint_every: int = 0
    eval_every: int = 0


@dataclass(slots=True)
class Progress:
    """How far a run is. ``tokens`` and ``skipped`` count from its very first step."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    last_loss: float | None = field(default=None)


class Hooks(Protocol):
    """What the loop calls back."""

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        ...

    def evaluate(self, progress: Progress) -> None:
        """Measure on held-out data."""
        ...


def run_loop(
    model: TrainableModel,
    loader: Loader,
    cadence: Cadence,
    learning_rate: Callable[[int], float],
    *,
    progress: Progress,
    hooks: Hooks,
    sink: Sink,
    stop: StopRequest,
) -> None:
    """Train from ``progress.step`` to ``cadence.total`` or until ``stop`` is requested.

    A checkpoint is always written before an evaluation, and when the loop ends.

    Raises:
        TrainingError: the loss is not finite (naming the step), or a checkpoint cannot be saved.
    """
    clock = _Clock(progress.step, cadence.total)
    while progress.step < cadence.total:
        batch = loader.next_batch()
        lr = learning_rate(progress.step)
        try:
            metrics = model.train_step(batch, lr)
        except TrainingError as error:
            raise TrainingError(f"step {progress.step + 1}: {error}") from error
        _advance(progress, metrics)
        if _due(progress.step, cadence.log_every) or progress.step == cadence.total:
            sink.write(_record(progress, metrics, lr, clock))
        ending = stop.requested is not None or progress.step == cadence.total
        if ending or _due(progress.step, cadence.checkpoint_every):
            hooks.save(progress)
        if stop.requested is not None:
            return
        if progress.step < cadence.total and _due(progress.step, cadence.eval_every):
            hooks.evaluate(progress)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _advance(progress: Progress, metrics: StepMetrics) -> None:
    progress.step += 1
    progress.tokens += metrics.tokens
    progress.skipped += metrics.skipped
    if isfinite(metrics.loss):
        progress.last_loss = metrics.loss


def _record(progress: Progress, metrics: StepMetrics, lr: float, clock: _Clock) -> Record:
    rate, eta = clock.rates(progress.step, progress.tokens)
    return {
        "event": "step",
        "step": progress.step,
        "loss": metrics.loss,
        "lr": lr,
        "grad_norm": metrics.grad_norm,
        "tokens": progress.tokens,
        "supervised_tokens": metrics.supervised_tokens,
        "skipped": metrics.skipped,
        "tokens_per_second": round(rate, 1),
        "eta_seconds": round(eta, 1),
    }


class _Clock:
    """Speed since the last report, and time left at the mean speed since the start."""

    def __init__(self, first_step: int, total: int) -> None:
        self._first, self._total = first_step, total
        self._started = self._before = perf_counter()
        self._tokens: int | None = None
        self._rate = 0.0

    def rates(self, step: int, tokens: int) -> tuple[float, float]:
        """Tokens per second and seconds left."""
        now = perf_counter()
        if self._tokens is not None and now > self._before:
            current = (tokens - self._tokens) / (now - self._before)
            self._rate = current if self._rate == 0 else 0.9 * self._rate + 0.1 * current
        self._tokens, self._before = tokens, now
        per_step = (now - self._started) / max(1, step - self._first)
        return self._rate, per_step * (self._total - step)
