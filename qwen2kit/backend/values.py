"""What passes between core and a backend, besides weights and slots: devices and capabilities,
scores, tokens, batches and figures of a step.

Backends find these in `qwen2kit.backend.protocol`, beside the protocols that use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TokenIds = Sequence[int]
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A place a model can run.

    Attributes:
        name: what ``ExecutionPlan.device`` takes, e.g. ``cpu``, ``cuda:0``, ``gpu``.
        kind: human-readable model of the device, e.g. ``NVIDIA H100 80GB HBM3``.
        memory_bytes: total memory, or None if unknown.
    """

    name: str
    kind: str
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do; everything else is refused with a message before work starts.

    ``quantized_bits`` are those of checkpoints whose weights stay packed, ``weight_bits`` those it
    quantises to itself, ``cache_bits`` those of cached keys and values.
    """

    dtypes: tuple[str, ...]
    quantized_bits: tuple[int, ...] = ()
    weight_bits: tuple[int, ...] = ()
    cache_bits: tuple[int, ...] = ()
    trains: bool = False
    distributed: bool = False
    moe: bool = False
    dual_chunk_attention: bool = False
    sliding_window: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `CompiledModel.load` did: tensors and bytes taken, seconds used, and what a user should
    know about it."""

    tensors: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probability of ``continuation`` after ``context``.

    ``context`` must hold at least one token (use the end-of-text id as prefix otherwise) and
    ``continuation`` at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of natural-log probabilities over the continuation, and whether greedy decoding would
    have produced exactly it."""

    logprob: float
    is_greedy: bool


class TokenEvent(NamedTuple):
    """One generated token.

    Attributes:
        prompt: index of the prompt it continues.
        token: the id (the stop id is emitted too, with ``finish_reason="stop"``).
        finish_reason: set on the last event of a prompt. With ``error`` the logits were NaN or
            infinite, and ``token`` is `qwen2kit.backend.slots.BROKEN`: nothing was drawn.
        logprob: natural-log probability, when `Sampling.logprobs` asked for it.
        top: the most likely ids and their log-probabilities, as many as `Sampling.top_logprobs`
            asked for, by falling probability.
    """

    prompt: int
    token: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One optimizer step's worth of rows of this process, NumPy int32 ``[rows, seq_len]``.

    Attributes:
        tokens: input ids.
        labels: the id each position must predict, already shifted; -100 where no loss applies.
        positions: position ids, restarting at 0 in every packed document.
        documents: document number within the row; attention never crosses it. Padding is -1.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]
    documents: NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Result of one optimizer step, the same on every process.

    Attributes:
        loss: mean negative log-likelihood in nats over all supervised tokens of the global batch.
        grad_norm: global L2 norm before clipping.
        tokens: tokens processed on all ranks, padding excluded.
        supervised_tokens: tokens that carried loss.
        skipped: True if the step was not applied (non-finite loss or gradient, or a loss above
            the caller's limit).
        peak_memory_bytes: most device memory any process has held since the model was compiled,
            or None where it is not measured.
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    skipped: bool = False
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A registered backend, known without importing it."""

    name: str
    package: str
    installed: bool
    reason: str = field(default="")
