"""ExecutionPlan: everything a backend is told besides the spec. Frozen data, made by core.

Backends read the plan and never the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen2kit.errors import ConfigError
from qwen2kit.plan.degrees import Degrees

Recompute = Literal["none", "selective", "full"]
TrainAttention = Literal["auto", "sdpa", "flash-attn-4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWPlan:
    """Decoupled weight decay Adam (arXiv 1711.05101).

    Attributes:
        betas, eps, weight_decay: as usual; decay applies to matrices only (`Param.decays`).
        max_grad_norm: global L2 clip; 0 disables clipping.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAPlan:
    """Train low-rank adapters instead of the weights (arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: the update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``).
        dropout: probability on the adapter's input while training.
        targets: last name of each linear layer that gets an adapter.
        rslora: rank-stabilised scaling (arXiv 2312.03732).
        quantize: storage of the frozen base matrices: ``none`` or ``nf4`` (QLoRA,
            arXiv 2305.14314).
        seed: of the adapters' initial values and of dropout.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    quantize: Literal["none", "nf4"] = "none"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How one optimizer step is computed.

    Attributes:
        optimizer: AdamW settings.
        micro_batch_rows: rows per forward pass; the rest of the batch is accumulated.
        loss_chunk_tokens: positions per slice of the output head, so that
            ``tokens x vocabulary`` logits never exist at once.
        non_finite: what to do with a NaN/Inf loss or gradient: ``raise`` stops training,
            ``skip`` leaves parameters and optimizer state untouched.
        parallel: processes per mesh axis.
        attention: whose kernels: the framework's own (``sdpa``), ``flash-attn-4``, or ``auto``:
            the latter where they are installed and fit.
        recompute: activations thrown away in the forward pass and computed again in the
            backward pass: ``none``, ``selective`` (all but matrix products and attention) or
            ``full`` (all but the layers' inputs).
        compile: compile every decoder layer; None leaves it to the backend (on where it pays).
        float8: compute the layers' matrix products in float8 with per-row scales.
        tune_products: measure which of cuBLASLt's algorithms computes each matrix product fastest
            and use it (CUDA, bfloat16, compiled layers).
        adapter: train LoRA adapters instead of the weights.
    """

    optimizer: AdamWPlan = AdamWPlan()
    micro_batch_rows: int = 8
    loss_chunk_tokens: int = 2048
    non_finite: str = "raise"
    parallel: Degrees = field(default_factory=Degrees)
    attention: TrainAttention = "auto"
    recompute: Recompute = "none"
    compile: bool | None = None
    float8: bool = False
    tune_products: bool = True
    adapter: LoRAPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """Where and in which precision to run.

    Attributes:
        device: a `Device.name`; ``auto`` lets the backend take its best one.
        dtype: compute dtype (``float32``, ``bfloat16``, ``float16``); ``auto`` is float32 on
            CPUs and bfloat16 elsewhere. Training keeps float32 master weights in any case.
        train: training settings, or None for inference.
        max_seq_len: longest sequence the caller will use, or None for the spec's limit.
        cpu_threads: threads of one operation on a CPU, or None for the framework's default. Very
            small models are as fast on one, and far faster where other programs run. Results
            are bit-identical only for equal numbers.
        cache_bits: keep keys and values of generated text in so many bits instead of the compute
            dtype (see `Capabilities.cache_bits`); None keeps them as they are.
        weight_bits: keep the decoder's matrices in so many bits (see `Capabilities.weight_bits`):
            they are quantised while loading, or taken as they are from a checkpoint stored in
            that many. None leaves it to the checkpoint and the backend. Not for training.
        weight_group_size: weights that share a scale: 32, 64 or 128.
    """

    device: str = "auto"
    dtype: str = "auto"
    train: TrainPlan | None = None
    max_seq_len: int | None = None
    cpu_threads: int | None = None
    cache_bits: int | None = None
    weight_bits: int | None = None
    weight_group_size: int = 64

    def __post_init__(self) -> None:
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ConfigError(f"cpu_threads must be at least 1, got {self.cpu_threads}")
        if self.weight_group_size not in (32, 64, 128):
            raise ConfigError(
                f"weight_group_size must be 32, 64 or 128, got {self.weight_group_size}"
            )
        if self.weight_bits is not None and self.train is not None:
            raise ConfigError("weight_bits is for inference; train with adapter.quantize instead")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(
                f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}"
            )
