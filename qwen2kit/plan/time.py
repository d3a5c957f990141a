"""Predicted seconds of one optimizer step: a roofline per kind of work, plus exposed communication.

Every product takes ``max(FLOPs / achievable FLOP/s, bytes / achievable bytes/s)`` (roofline model,
doi 10.1145/1498765.1498785); elementwise work and AdamW are bound by memory. A pipeline of p stages
and m micro-batches takes ``m + p - 1`` slots of its slowest stage (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qwen2kit.plan.communication import Cluster, layer_communication, once_per_step
from qwen2kit.plan.hardware import Hardware
from qwen2kit.plan.stages import Stage
from qwen2kit.plan.workload import (
    MASTER_BYTES,
    Workload,
    ffn_width,
    layer_kinds,
    matrices,
    share,
)
from qwen2kit.spec.counts import train_flops_per_token

PARTS: Final = (
    "matmul", "attention", "head", "elementwise", "recompute", "launch", "communication",
    "bubble", "optimizer",
)  # fmt: skip

MATMUL_EFFICIENCY: Final = 0.68
"""Share of the peak that large matrix products reach during training (measured on H100)."""

ATTENTION_EFFICIENCY: Final = {64: 0.41, 128: 0.54}
"""Share of the peak that attention's forward pass reaches, by width of a head (measured on H100
with cuDNN's kernels)."""

ATTENTION_BACKWARD: Final = 3.0
"""Time of attention's backward pass over its forward pass: 2.5 times the products, less well."""

ELEMENTWISE_BACKWARD: Final = 1.5
"""Memory traffic of the backward pass's elementwise work over the forward pass's."""

MEMORY_EFFICIENCY: Final = 0.80
"""Share of the memory bandwidth that streaming kernels reach."""

FLOAT8_SPEEDUP: Final = 1.4
"""Layers' products in float8 over bfloat16, casts included (a third more tokens per second for
8B parameters in torchtitan's published figures)."""

LOGIT_TRAFFIC: Final = 4.1
"""Bytes read and written per logit by the fused loss kernel, whose second reading is mostly served
by the L2 cache (measured on H100)."""

WIDE_LOGIT_TRAFFIC: Final = 38.0
"""The same without it, where the vocabulary is divided or products are float32: float32 copies
are made, summed, and turned into slopes."""

HEAD_TRAFFIC: Final = 8.0
"""Bytes per weight of the head and chunk: its float32 gradient is read and written."""

ADAMW_TRAFFIC: Final = 36.0
"""Bytes per parameter and step: update (28), norm (4), clipped gradients written (4)."""

CAST_TRAFFIC: Final = 6.0
"""Bytes per weight of a cast from float32 to bfloat16."""

DEQUANTIZE_TRAFFIC: Final = 2.6
"""Bytes per NF4 weight each time it is expanded: codes and scales read, bfloat16 written."""

HOST_SECONDS: Final = {True: 4e-4, False: 2e-3}
"""Python and kernel launches of one layer, forward and backward, compiled or not: a floor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the slowest pipeline stage.

    Attributes:
        matmul, attention, head, elementwise: forward and backward pass of all micro-batches.
        recompute: forward passes done again.
        launch: waiting for the host, where the kernels are too short for it.
        communication: not hidden behind computation.
        bubble: waiting for the other stages.
        optimizer: clipping and AdamW.
    """

    matmul: float
    attention: float
    head: float
    elementwise: float
    recompute: float
    launch: float
    communication: float
    bubble: float
    optimizer: float

    @property
    def parts(self) -> dict[str, float]:
        """The seconds by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of computation for one micro-batch on one process."""

    matmul: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    elementwise: float = 0.0
    recompute: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.head + self.elementwise + self.recompute

    def add(self, other: _Work, count: int) -> _Work:
        """With ``count`` times ``other``."""
        return _Work(
            matmul=self.matmul + count * other.matmul,
            attention=self.attention + count * other.attention,
            head=self.head + count * other.head,
            elementwise=self.elementwise + count * other.elementwise,
            recompute=self.recompute + count * other.recompute,
        )


def predict(workload: Workload, cluster: Cluster) -> StepTime:
    """The step's time on the slowest stage."""
    times = [_stage_time(workload, stage, cluster) for stage in workload.ends]
    return max(times, key=lambda time: time.total)


def flops_per_token(workload: Workload) -> float:
    """Model FLOPs per token, as in MFU: recomputation not counted, and no weight gradients for
    frozen weights (a third of the matrix products of full training)."""
    frozen = workload.plan.adapter is not None
    return train_flops_per_token(workload.spec, workload.seq_len, frozen=frozen)


def tokens_per_second(workload: Workload, seconds: float) -> float:
    """Tokens per second of all processes at ``seconds`` per step."""
    return workload.tokens_per_step / seconds


def mfu(workload: Workload, cluster: Cluster, seconds: float) -> float:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) of the dtype's dense peak."""
    rate = flops_per_token(workload) * tokens_per_second(workload, seconds)
    return rate / (cluster.gpus * cluster.hardware.peak(workload.dtype))


def _stage_time(workload: Workload, stage: Stage, cluster: Cluster) -> StepTime:
    hardware, micro = cluster.hardware, workload.micro_batches
    work = _Work(head=_head_seconds(workload, hardware) if stage.last else 0.0)
    exposed = 0.0
    for layer, count in layer_kinds(workload.spec, stage):
        forward, backward = _layer_work(workload, layer, hardware)
        work = work.add(forward, count).add(backward, count)
        exposed += count * layer_communication(
            workload, stage, cluster, forward.total, backward.total
        )
    launch = max(0.0, HOST_SECONDS[workload.compiled] * len(stage.layers) - work.total)
    slot = work.total + launch + exposed
    return StepTime(
        matmul=micro * work.matmul,
        attention=micro * work.attention,
        head=micro * work.head,
        elementwise=micro * work.elementwise,
        recompute=micro * work.recompute,
        launch=micro * launch,
        communication=micro * exposed + once_per_step(workload, stage, cluster),
        bubble=(stage.count - 1) * slot,
        optimizer=_bytes_seconds(hardware, ADAMW_TRAFFIC * share(workload, stage).trainable),
    )


def _layer_work(workload: Workload, layer: int, hardware: Hardware) -> tuple[_Work, _Work]:
    """Forward and backward pass of one layer."""
    plan = workload.plan
    products, casts = _products(workload, layer, hardware)
    attention = _attention(workload, layer, hardware)
    elementwise = _elementwise(workload, layer, hardware)
    frozen = plan.adapter is not None
    again = {"none": 0.0, "selective": elementwise, "full": products + attention + elementwise}
    return (
        _Work(matmul=products, attention=attention, elementwise=elementwise + casts),
        _Work(
            matmul=products * (1 if frozen else 2),
            attention=attention * ATTENTION_BACKWARD,
            elementwise=elementwise * ELEMENTWISE_BACKWARD + casts,
            recompute=again[plan.recompute],
        ),
    )


def _products(workload: Workload, layer: int, hardware: Hardware) -> tuple[float, float]:
    """Seconds of a layer's products in the forward pass, and of making its weights ready."""
    tokens, width = workload.tokens, workload.width
    rate = MATMUL_EFFICIENCY * hardware.peak(workload.dtype)
    if workload.plan.float8:
        rate *= FLOAT8_SPEEDUP
    seconds, weights = 0.0, 0
    for outputs, inputs in matrices(workload.spec, layer, workload.degrees.tp):
        traffic = width * (tokens * (inputs + outputs) + inputs * outputs)
        flops = 2 * tokens * inputs * outputs
        seconds += max(flops / rate, _bytes_seconds(hardware, traffic))
        weights += inputs * outputs
    return seconds, _bytes_seconds(hardware, weights * _weight_traffic(workload))


def _weight_traffic(workload: Workload) -> float:
    adapter = workload.plan.adapter
    if adapter is not None:
        return DEQUANTIZE_TRAFFIC if adapter.quantize == "nf4" else 0.0
    return CAST_TRAFFIC if workload.autocast else 0.0


def _attention(workload: Workload, layer: int, hardware: Hardware) -> float:
    """Causal: half of the keys on average; a sliding window sees at most its length."""
    spec = workload.spec
    keys = workload.seq_len / 2
    window = spec.window_of(layer)
    if window is not None:
        keys = min(keys, window)
    queries = spec.num_attention_heads * spec.head_dim / workload.degrees.tp
    flops = 4 * workload.tokens * keys * queries
    efficiency = ATTENTION_EFFICIENCY[64 if spec.head_dim < 128 else 128]
    return flops / (efficiency * hardware.peak(workload.dtype))


def _elementwise(workload: Workload, layer: int, hardware: Hardware) -> float:
    """Norms and residual sums (ten passes over D), rotation (two over Q and K), SwiGLU (three
    over F)."""
    spec, tp = workload.spec, workload.degrees.tp
    heads = (spec.num_attention_heads + spec.num_key_value_heads) * spec.head_dim
    values = 10 * spec.hidden_size / tp + 2 * heads / tp + 3 * ffn_width(spec, layer, tp)
    return _bytes_seconds(hardware, workload.tokens * workload.width * values)


def _head_seconds(workload: Workload, hardware: Hardware) -> float:
    """Head and loss, forward and backward: gradients are formed while the logits exist."""
    spec, plan = workload.spec, workload.plan
    vocab = spec.vocab_size / workload.degrees.tp
    trained = plan.adapter is None
    weights = vocab * spec.hidden_size
    flops = (6 if trained else 4) * workload.tokens * weights
    fused = workload.degrees.tp == 1 and workload.width < MASTER_BYTES
    traffic = workload.tokens * vocab * (LOGIT_TRAFFIC if fused else WIDE_LOGIT_TRAFFIC)
    if trained:
        traffic += HEAD_TRAFFIC * weights * max(1, workload.tokens / plan.loss_chunk_tokens)
    rate = MATMUL_EFFICIENCY * hardware.peak(workload.dtype)
    return flops / rate + _bytes_seconds(hardware, traffic)


def _bytes_seconds(hardware: Hardware, traffic: float) -> float:
    return traffic / (MEMORY_EFFICIENCY * hardware.memory_bandwidth)
