"""Bytes that the forward pass keeps of one decoder layer and of the head, per micro-batch.

What is kept is what autograd saves of the torch backend's decoder layer, counted in tensors of
each width; tests compare the counts with what PyTorch saves. Working sets, which exist for
moments only, are calibrated with ``benchmarks/plan_accuracy.py``. Notation: D hidden size,
Q = heads * head_dim, KV = kv_heads * head_dim, F intermediate size, all of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qwen2kit.backend.plan import Recompute
from qwen2kit.plan.workload import Workload, adapted, ffn_width, matrices


@dataclass(frozen=True, slots=True)
class Kept:
    """Tensors kept per layer, in the compute dtype unless it says otherwise.

    Attributes:
        stream: of width D, divided by sequence parallelism: the layer's input, the projected
            attention.
        wide: of width D in float32, divided likewise: what the norms' statistics are taken of.
        inputs: of width D: inputs of matrix products, whole under tensor parallelism.
        attention: 1 if query, key, value, output and log-sum-exp are kept, else 0.
        ffn: of width F: gate, up, silu(gate), their product.
        norms: 1 if the norms' statistics are kept, else 0.
        weights: 1 if copies of weights are kept that are made for the products, else 0.
    """

    stream: float
    wide: float
    inputs: float
    attention: float
    ffn: float
    norms: float
    weights: float


KEPT: Final[dict[tuple[Recompute, bool], Kept]] = {
    # (recompute, compiled)
    ("none", True): Kept(2, 0, 2, 1, 3, 1, 1),
    ("none", False): Kept(2, 2, 2, 1, 4, 1, 1),
    ("selective", True): Kept(2, 0, 0, 1, 2, 0, 0),
    ("selective", False): Kept(3, 0, 0, 1, 2, 0, 0),
    ("full", True): Kept(1, 0, 0, 0, 0, 0, 0),
    ("full", False): Kept(1, 0, 0, 0, 0, 0, 0),
}

PROJECTIONS: Final = 5
"""Products that read a normalised input, each through a cast of its own without compilation."""

WORKING_HIDDEN: Final = 4.0
"""D-wide gradients alive at once in a layer's backward pass."""

WORKING_FFN: Final = 3.0
"""F-wide gradients alive at once in a layer's backward pass."""

WORKING_ADAPTED: Final = 5.0
"""F-wide products of base and adapter, not yet added up, while a layer with adapters is computed
again."""

LOGIT_BYTES: Final = 2.0
"""Bytes per logit of one chunk: bfloat16, overwritten by their gradient."""

WIDE_LOGIT_BYTES: Final = 10.0
"""Bytes per logit where the vocabulary is divided or products are float32: without the fused
kernel there are float32 copies as well."""


def layer_kept(workload: Workload, layer: int) -> float:
    """Bytes kept of decoder layer ``layer`` for one micro-batch."""
    return workload.tokens * _per_token(workload, layer, workload.plan.recompute)


def layer_working(workload: Workload, layer: int) -> float:
    """Bytes that exist only during a layer's backward pass, recomputed activations included."""
    spec, tp = workload.spec, workload.degrees.tp
    per_ffn, again = WORKING_FFN, 0.0
    if workload.plan.recompute != "none":
        per_ffn += WORKING_ADAPTED if workload.plan.adapter is not None else 0
        kept = _per_token(workload, layer, workload.plan.recompute)
        again = max(0.0, _per_token(workload, layer, "none") - kept)
    values = WORKING_HIDDEN * spec.hidden_size + per_ffn * ffn_width(spec, layer, tp)
    return workload.tokens * (values * workload.width + again)


def weight_copies(workload: Workload, layer: int) -> float:
    """Bytes of a layer's weights that were made for its products and are kept: under autocast
    all matrices, or those of its adapters; in replicas those joined into one product."""
    plan = workload.plan
    if not KEPT[plan.recompute, workload.compiled].weights:
        return 0.0
    if plan.adapter is not None:
        factors = adapted(workload.spec, plan.adapter, layer)
        return workload.width * sum(plan.adapter.rank * (out + into) for out, into in factors)
    if workload.autocast:
        shapes = matrices(workload.spec, layer, workload.degrees.tp)
        return workload.width * sum(out * into for out, into in shapes)
    if not workload.joint:
        return 0.0
    spec = workload.spec
    heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
    joined = heads * spec.head_dim + 2 * ffn_width(spec, layer, 1)
    return workload.width * spec.hidden_size * joined


def head_kept(workload: Workload) -> float:
    """Bytes around the head: the final norm's float32 input and its normalised form, its output
    and the output's gradient."""
    width, tp = workload.width, workload.degrees.tp
    normalised = width if workload.plan.adapter is None else 0
    output = width if workload.fsdp else 4  # a float32 norm makes its output float32
    per_channel = (4 + normalised) / tp + 2 * output
    return workload.tokens * workload.spec.hidden_size * per_channel


def logits(workload: Workload) -> float:
    """Bytes of the logits that exist at once."""
    chunk = min(workload.plan.loss_chunk_tokens, workload.tokens)
    fused = workload.degrees.tp == 1 and workload.width < 4
    per_logit = LOGIT_BYTES if fused else WIDE_LOGIT_BYTES
    return chunk * per_logit * workload.spec.vocab_size / workload.degrees.tp


def _per_token(workload: Workload, layer: int, recompute: Recompute) -> float:
    spec, degrees, width = workload.spec, workload.degrees, workload.width
    kept = KEPT[recompute, workload.compiled]
    stream = (kept.stream * width + kept.wide * 4) / degrees.tp
    inputs = kept.inputs
    if recompute == "none" and not workload.compiled and not workload.fsdp:
        # Under autocast every projection casts; frozen norms keep no normalised input.
        inputs = PROJECTIONS if width < 4 else inputs
        stream -= kept.stream * width if workload.plan.adapter is not None else 0
    hidden = spec.hidden_size * (stream + inputs * width)
    attention = kept.attention * _attention(workload)
    ffn = kept.ffn * ffn_width(spec, layer, degrees.tp) * width
    return hidden + attention + ffn + 8 * kept.norms + _adapters(workload, layer, recompute)


def _attention(workload: Workload) -> float:
    """Query, key, value, output and log-sum-exp of one token."""
    spec, degrees = workload.spec, workload.degrees
    query = spec.num_attention_heads * spec.head_dim / degrees.tp
    key_value = 2 * spec.num_key_value_heads * spec.head_dim / degrees.tp
    values = 2 * query + key_value * degrees.cp  # keys and values of the whole row
    return values * workload.width + 4 * spec.num_attention_heads / degrees.tp


def _adapters(workload: Workload, layer: int, recompute: Recompute) -> float:
    """What adapters add to a token: their inner values."""
    adapter = workload.plan.adapter
    if adapter is None or recompute == "full":
        return 0.0
    return workload.width * adapter.rank * len(adapted(workload.spec, adapter, layer))
