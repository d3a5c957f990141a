"""Recipe nodes of optimisation: steps, batch, AdamW, learning-rate schedule, loss spikes."""

from __future__ import annotations

from dataclasses import field
from math import isfinite
from typing import Annotated, Literal

from qwen2kit.config.node import ByKind, check, node


def _check_schedule(warmup: float, min_ratio: float) -> None:
    check(
        (0 <= warmup < 1, f"warmup is a fraction of all steps in [0, 1), got {warmup}"),
        (0 <= min_ratio <= 1, f"min_ratio must be in [0, 1], got {min_ratio}"),
    )


@node
class Cosine:
    """Linear warm-up, then a half cosine from the peak to ``min_ratio`` times the peak.

    Attributes:
        warmup: fraction of all steps.
        min_ratio: learning rate at the last step over the peak.
    """

    kind: Literal["cosine"] = "cosine"
    warmup: float = 0.01
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_ratio)


@node
class Linear:
    """Linear warm-up, then a straight line from the peak to ``min_ratio`` times the peak."""

    kind: Literal["linear"] = "linear"
    warmup: float = 0.0
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_ratio)


@node
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): constant, then a straight line at the end.

    Attributes:
        decay: fraction of all steps spent in the final decay.
    """

    kind: Literal["wsd"] = "wsd"
    warmup: float = 0.01
    decay: float = 0.2
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_ratio)
        check(
            (0 < self.decay <= 1, f"decay is a fraction of all steps in (0, 1], got {self.decay}"),
            (self.warmup + self.decay <= 1, "warmup + decay must not exceed 1"),
        )


@node
class Constant:
    """Linear warm-up, then the peak."""

    kind: Literal["constant"] = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, 0.0)


ScheduleConfig = Annotated[Cosine | Linear | WSD | Constant, ByKind()]


@node
class AdamWConfig:
    """AdamW (arXiv 1711.05101); the defaults are the report's.

    Attributes:
        max_grad_norm: global L2 clip; 0 disables clipping.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check(
            (all(0 <= b < 1 for b in self.betas), f"betas must be in [0, 1), got {self.betas}"),
            (0 < self.eps < 1, f"eps must be in (0, 1), got {self.eps}"),
            (
                0 <= self.weight_decay < 1,
                f"weight_decay must be in [0, 1), got {self.weight_decay}",
            ),
            (
                isfinite(self.max_grad_norm) and self.max_grad_norm >= 0,
                f"max_grad_norm must not be negative, got {self.max_grad_norm}",
            ),
        )


def _check_spike(factor: float, window: int) -> None:
    check(
        (isfinite(factor) and factor > 0, f"factor must be positive, got {factor}"),
        (window >= 4, f"window must be at least 4 steps, got {window}"),
    )


@node
class KeepSpikes:
    """Every finite loss is trained on."""

    kind: Literal["off"] = "off"


@node
class SkipSpikes:
    """A step whose loss is far above the recent ones changes nothing.

    Attributes:
        factor: how far above the median, in robust standard deviations (1.4826 times the median
            absolute deviation).
        window: how many steps are looked back; the first ``window`` steps are always taken.
    """

    kind: Literal["skip"] = "skip"
    factor: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        _check_spike(self.factor, self.window)


@node
class RewindSpikes:
    """A spike (as for `SkipSpikes`, or a loss that is not finite) takes the run back to its newest
    checkpoint; the rows seen since then are not seen again (PaLM, arXiv 2204.02311, section 5.1).

    Attributes:
        max_rewinds: the run stops at the next one.
    """

    kind: Literal["rewind"] = "rewind"
    factor: float = 6.0
    window: int = 128
    max_rewinds: int = 10

    def __post_init__(self) -> None:
        _check_spike(self.factor, self.window)
        check((self.max_rewinds >= 1, f"max_rewinds must be at least 1, got {self.max_rewinds}"))


SpikeConfig = Annotated[KeepSpikes | SkipSpikes | RewindSpikes, ByKind()]


@node
class TrainConfig:
    """How long and how to optimise.

    Attributes:
        steps: number of optimizer steps; exactly one of ``steps`` and ``epochs`` is set.
        epochs: passes over the data.
        batch_rows: rows of ``seq_len`` tokens per optimizer step, all ranks together.
        micro_batch_rows: rows per forward pass; must divide ``batch_rows``.
        lr: peak learning rate.
        seed: of initial weights and data order.
        non_finite: ``raise`` stops at a NaN or infinite loss; ``skip`` leaves the step out.
        spike: what to do about a loss far above the recent ones.
        max_skipped: the run stops when more steps than that were left out in a row.
        loss_chunk_tokens: positions per slice of the output head.
        attention: as in `TrainPlan`.
        recompute, float8, tune_products: as in `TrainPlan`.
        compile: compile the layers; None leaves it to the backend.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_rows: int = 32
    micro_batch_rows: int = 8
    lr: float = 3e-4
    schedule: ScheduleConfig = field(default_factory=Cosine)
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    seed: int = 0
    non_finite: Literal["raise", "skip"] = "raise"
    spike: SpikeConfig = field(default_factory=KeepSpikes)
    max_skipped: int = 20
    loss_chunk_tokens: int = 2048
    attention: Literal["auto", "sdpa", "flash-attn-4"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool | None = None
    float8: bool = False
    tune_products: bool = True

    def __post_init__(self) -> None:
        check(
            ((self.steps is None) != (self.epochs is None), "set exactly one of steps and epochs"),
            (self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}"),
            (
                self.epochs is None or self.epochs >= 1,
                f"epochs must be at least 1, got {self.epochs}",
            ),
            (self.batch_rows >= 1, f"batch_rows must be at least 1, got {self.batch_rows}"),
            (
                self.micro_batch_rows >= 1 and self.batch_rows % self.micro_batch_rows == 0,
                f"micro_batch_rows={self.micro_batch_rows} must divide "
                f"batch_rows={self.batch_rows}",
            ),
            (isfinite(self.lr) and self.lr > 0, f"lr must be positive, got {self.lr}"),
            (0 <= self.seed < 2**63, f"seed must be in [0, 2^63), got {self.seed}"),
            (self.max_skipped >= 0, f"max_skipped must not be negative, got {self.max_skipped}"),
            (
                self.loss_chunk_tokens >= 1,
                f"loss_chunk_tokens must be at least 1, got {self.loss_chunk_tokens}",
            ),
        )
