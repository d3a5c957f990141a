"""Predicted device memory of every pipeline stage, in bytes of one process.

A step has five moments at which memory can be fullest: while the loss is computed (all
activations and the logits), in the backward pass of the last layer (all activations and a layer's
working set), in that of the first layer (almost all gradients), when the embedding's gradient is
formed, and while AdamW updates (no activations). A process needs the largest of them.

Sources: float32 masters, gradients and two moments, 16 bytes per parameter (ZeRO, arXiv
1910.02054, section 3.1, without its half-precision copies); micro-batches in flight in a 1F1B
pipeline (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qwen2kit.plan import activations
from qwen2kit.plan.stages import Stage
from qwen2kit.plan.workload import MASTER_BYTES, Share, Workload, layer_kinds, share

Moment = Literal["loss", "last layer", "first layer", "embedding", "update"]
PARTS: Final = ("weights", "gradients", "optimizer", "activations", "logits", "other")

MOMENTS: Final = 2
"""AdamW's moments per parameter."""

LAYERS_IN_FLIGHT: Final = 2
"""Layers whose gathered weights exist at once: FSDP fetches the next one early."""

REDUCE_BYTES: Final = 2 + MASTER_BYTES
"""Bytes per gathered parameter of a layer while FSDP reduces its gradient: the bfloat16 gradient
and its float32 copy."""

WORKSPACE: Final = 64 * 2**20
"""Bytes of cuBLAS workspaces, rotary tables and other small buffers."""

FRAGMENTATION: Final = 1.05
"""Reserved over allocated bytes of PyTorch's caching allocator."""

CONTEXT: Final = 640 * 2**20
"""Bytes of the CUDA context and loaded kernels, outside the allocator."""

COMMUNICATORS: Final = 1024 * 2**20
"""Bytes of NCCL's buffers in a run of several processes, outside the allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process at its fullest moment.

    Attributes:
        moment: when that is.
        weights, gradients, optimizer: of the trained and frozen parameters.
        activations: kept for the backward pass.
        logits: of one chunk, with the head's copies.
        other: gathered weights, working sets, workspaces.
    """

    moment: Moment
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def allocated(self) -> int:
        """All tensors: what ``torch.cuda.max_memory_allocated`` reports."""
        return sum(self.parts.values())

    def on_device(self, processes: int) -> int:
        """What the device must have: fragmentation, CUDA context and NCCL buffers included."""
        outside = CONTEXT + (COMMUNICATORS if processes > 1 else 0)
        return round(self.allocated * FRAGMENTATION) + outside


def predict(workload: Workload) -> tuple[Memory, ...]:
    """Memory of the processes of each pipeline stage."""
    return tuple(stage_memory(workload, stage) for stage in workload.stages)


def stage_memory(workload: Workload, stage: Stage) -> Memory:
    """Memory of the processes of one pipeline stage."""
    held = share(workload, stage)
    return max(_moments(workload, stage, held), key=lambda memory: memory.allocated)


def in_flight(workload: Workload, stage: Stage) -> int:
    """Micro-batches whose activations a stage holds at once."""
    if workload.degrees.schedule == "gpipe" and stage.count > 1:
        return workload.micro_batches
    return min(stage.count - stage.index, workload.micro_batches)


def _moments(workload: Workload, stage: Stage, held: Share) -> tuple[Memory, ...]:
    kinds = layer_kinds(workload.spec, stage)
    layers = {layer: activations.layer_kept(workload, layer) for layer, _ in kinds}
    kept = sum(count * layers[layer] for layer, count in kinds) * in_flight(workload, stage)
    copies = sum(count * activations.weight_copies(workload, layer) for layer, count in kinds)
    working = max(activations.layer_working(workload, layer) for layer, _ in kinds)
    again = workload.micro_batches > 1  # gradients of earlier micro-batches are there
    gradients = MASTER_BYTES * held.trainable
    earlier = gradients if again else 0
    matrix = _vocabulary_gradient(workload, stage, held)
    tied = workload.spec.tie_word_embeddings and stage.count == 1
    gathered, reduced = _gathered(workload, stage, held)
    head, logits = 0.0, 0.0
    if stage.last:
        head = activations.head_kept(workload)
        logits = activations.logits(workload) + matrix + _head_copy(workload)
    pending = matrix if tied or not again else 0.0  # of the head, until it can be added
    unformed = 0 if again else MASTER_BYTES * _first_layer(workload, stage, held)
    transient = copies + working + gathered
    return (
        _memory("loss", held, earlier, kept + head, logits, copies + gathered),
        _memory("last layer", held, earlier, kept, pending, transient),
        _memory(
            "first layer",
            held,
            gradients - unformed,
            max(layers.values()),
            matrix if tied else 0.0,
            working + gathered,
        ),
        _memory("embedding", held, gradients, 0.0, matrix * (tied + again), reduced),
        _memory("update", held, gradients, 0.0, 0.0, 0.0),
    )


def _first_layer(workload: Workload, stage: Stage, held: Share) -> int:
    """Trained elements whose gradients come last: of the first layer and the embedding."""
    elements = held.layer_trainable
    if stage.first and held.root_trainable:
        elements += round(_vocabulary(workload))
    return elements // workload.degrees.sharded


def _memory(
    moment: Moment, held: Share, gradients: int, kept: float, logits: float, other: float
) -> Memory:
    return Memory(
        moment=moment,
        weights=held.weight_bytes,
        gradients=gradients,
        optimizer=MOMENTS * MASTER_BYTES * held.trainable,
        activations=round(kept),
        logits=round(logits),
        other=round(other) + WORKSPACE,
    )


def _vocabulary_gradient(workload: Workload, stage: Stage, held: Share) -> float:
    """Bytes of the whole gradient of the head, or of the embedding where that is all there is."""
    if not held.root_trainable or not (stage.first or stage.last):
        return 0.0
    return MASTER_BYTES * _vocabulary(workload)


def _head_copy(workload: Workload) -> float:
    """Bytes of the head's matrix in the compute dtype, where it is stored in float32."""
    stored = workload.plan.adapter is not None and not workload.spec.tie_word_embeddings
    if workload.fsdp or stored or workload.width == MASTER_BYTES:
        return 0.0
    return workload.width * _vocabulary(workload)


def _vocabulary(workload: Workload) -> float:
    return workload.spec.vocab_size * workload.spec.hidden_size / workload.degrees.tp


def _gathered(workload: Workload, stage: Stage, held: Share) -> tuple[float, float]:
    """Bytes of weights that FSDP gathers and gradients that it reduces, while layers run and at
    the end. A pipeline keeps all weights and, undivided, all gradients of the step."""
    if not workload.fsdp:
        return 0.0, 0.0
    last = workload.width * held.root + REDUCE_BYTES * held.root_trainable
    reduced = REDUCE_BYTES * held.layer_trainable
    if stage.count == 1:
        weights = workload.width * (held.root + LAYERS_IN_FLIGHT * held.layer)
        return weights + reduced, last
    elements = held.root + held.layers * held.layer
    trainable = held.root_trainable + held.layers * held.layer_trainable
    kept = workload.width * elements + MASTER_BYTES * trainable
    return kept + reduced, kept
