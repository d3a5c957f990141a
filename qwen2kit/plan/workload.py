"""What is to be predicted: one optimizer step, and what one process holds of the model.

Sizes follow from the schema: tensor parallelism divides the dimensions that
`qwen2kit.plan.sharding` names, the pipeline deals out layers (`qwen2kit.plan.stages`), and FSDP
divides dimension 0 of what is left over ``dp_shard * cp`` processes, rounding up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Final

from qwen2kit.backend.plan import LoRAPlan, TrainPlan
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.sharding import local_shape
from qwen2kit.plan.stages import Stage, stages
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import Param, schema

MASTER_BYTES: Final = 4
"""Bytes of a trained weight, of its gradient and of each moment: all float32."""

NF4_BYTES: Final = 0.5 + 4 / 64
"""Bytes of a weight in NF4: four bits, and one float32 scale for 64 of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimizer step.

    Attributes:
        spec: the model.
        plan: how it is trained, ``plan.parallel`` included.
        seq_len: tokens per row.
        batch_rows: rows per step, all processes together.
        dtype: of the matrix products, ``bfloat16`` or ``float32``.
    """

    spec: ModelSpec
    plan: TrainPlan
    seq_len: int
    batch_rows: int
    dtype: str = "bfloat16"

    @property
    def degrees(self) -> Degrees:
        """Processes per mesh axis."""
        return self.plan.parallel

    @property
    def micro_batches(self) -> int:
        """Forward passes per step on each process."""
        rows = self.batch_rows // self.degrees.data
        return max(1, rows // self.plan.micro_batch_rows)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch that one process computes outside sequence parallelism."""
        rows = min(self.plan.micro_batch_rows, max(1, self.batch_rows // self.degrees.data))
        return rows * self.seq_len // self.degrees.cp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the whole batch."""
        return self.batch_rows * self.seq_len

    @property
    def width(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled, which is the default on CUDA."""
        return self.plan.compile is not False

    @property
    def fsdp(self) -> bool:
        """Whether weights travel between processes, in the compute dtype."""
        return self.degrees.sharded > 1 or self.degrees.dp_replicate > 1

    @property
    def autocast(self) -> bool:
        """Whether products cast float32 weights themselves."""
        return self.width < MASTER_BYTES and not self.fsdp and self.plan.adapter is None

    @property
    def joint(self) -> bool:
        """Whether projections of one input are computed as one product, which is not done where
        the joined weights would be kept beside FSDP's."""
        plain = self.plan.adapter is None and not self.plan.float8 and self.degrees.tp == 1
        whole = self.degrees.sharded == 1 or self.plan.recompute != "none"
        return self.compiled and plain and whole

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The pipeline's stages; one without a pipeline."""
        return stages(self.spec, self.degrees.pp)

    @property
    def ends(self) -> tuple[Stage, ...]:
        """The first stage and the last: no stage between has more layers or more to hold than
        the first."""
        first, *_, last = (*self.stages, self.stages[-1])
        return (first,) if first is last else (first, last)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A stored tensor of one process, before FSDP.

    Attributes:
        shape: after tensor parallelism.
        bytes: per element.
        trainable: whether it has a gradient and moments.
    """

    shape: tuple[int, ...]
    bytes: float
    trainable: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process of a pipeline stage holds.

    Attributes:
        layers: decoder layers of the stage.
        weight_bytes: stored weights, after FSDP.
        trainable: elements with a gradient and moments, after FSDP.
        layer: elements of the largest decoder layer, before FSDP.
        layer_trainable: those of them that are trained.
        root: elements outside the layers (embedding, norm, head), before FSDP.
        root_trainable: those of them that are trained.
    """

    layers: int
    weight_bytes: int
    trainable: int
    layer: int
    layer_trainable: int
    root: int
    root_trainable: int


def share(workload: Workload, stage: Stage) -> Share:
    """What process 0 of ``stage`` holds; no process holds more."""
    degrees = workload.degrees
    return _share(
        workload.spec, workload.plan.adapter, workload.width, degrees.tp, degrees.sharded, stage
    )


def held(shape: tuple[int, ...], shards: int, rank: int = 0) -> int:
    """Elements of a tensor on one of ``shards`` FSDP processes: dimension 0 in equal pieces, the
    last ones smaller or empty."""
    rows = -(-shape[0] // shards)
    mine = min(rows, max(0, shape[0] - rank * rows))
    return mine * prod(shape[1:])


def tensors(param: Param, adapter: LoRAPlan | None, width: int, tp: int) -> Iterator[Tensor]:
    """What ``param`` is stored as on one process of the ``tp`` axis.

    Trained weights are float32. Beside an adapter matrices and biases are frozen in the compute
    dtype (``width`` bytes) or NF4, embedding and norms in float32.
    """
    shape = local_shape(param, tp)
    if adapter is None:
        yield Tensor(shape, MASTER_BYTES, True)
        return
    linear = param.kind == "linear"
    frozen = MASTER_BYTES if param.kind in ("embedding", "norm", "router") else width
    yield Tensor(shape, NF4_BYTES if linear and adapter.quantize == "nf4" else frozen, False)
    if _has_adapter(param, adapter):
        yield Tensor((adapter.rank, shape[1]), MASTER_BYTES, True)
        yield Tensor((shape[0], adapter.rank), MASTER_BYTES, True)


def trainable_parameters(spec: ModelSpec, adapter: LoRAPlan | None) -> int:
    """Trained elements of the whole model."""
    return sum(
        tensor.size
        for param in schema(spec)
        for tensor in tensors(param, adapter, MASTER_BYTES, 1)
        if tensor.trainable
    )


@lru_cache(maxsize=1024)
def matrices(spec: ModelSpec, layer: int, tp: int) -> tuple[tuple[int, int], ...]:
    """``(outputs, inputs)`` of every matrix a token is multiplied by in a decoder layer, on one
    process of the ``tp`` axis. Of a sparse layer these are the router, the shared expert and the
    experts chosen."""
    chosen = spec.moe.num_experts_per_tok if spec.moe else 0
    return tuple(
        (shape[0], shape[1])
        for param in _layer_params(spec, spec.is_sparse(layer))
        if param.decays and (param.expert is None or param.expert < chosen)
        for shape in (local_shape(param, tp),)
    )


@lru_cache(maxsize=64)
def adapted(spec: ModelSpec, adapter: LoRAPlan, layer: int) -> tuple[tuple[int, int], ...]:
    """``(outputs, inputs)`` of every matrix of a decoder layer that has an adapter."""
    return tuple(
        (param.shape[0], param.shape[1])
        for param in _layer_params(spec, spec.is_sparse(layer))
        if _has_adapter(param, adapter)
    )


def ffn_width(spec: ModelSpec, layer: int, tp: int) -> float:
    """Intermediate size of a layer on one process; in a sparse layer, of the shared expert and
    all experts that a token passes through."""
    moe = spec.moe
    if moe is None or not spec.is_sparse(layer):
        return spec.intermediate_size / tp
    shared = moe.shared_expert_intermediate_size / tp
    return moe.num_experts_per_tok * moe.moe_intermediate_size + shared


@lru_cache(maxsize=4096)
def layer_kinds(spec: ModelSpec, stage: Stage) -> tuple[tuple[int, int], ...]:
    """``(layer, count)``: one decoder layer of every kind in ``stage``, and how many are like it.

    Layers differ by being sparse or dense and by their attention window.
    """
    kinds: dict[tuple[bool, int | None], list[int]] = {}
    for layer in stage.layers:
        kinds.setdefault((spec.is_sparse(layer), spec.window_of(layer)), []).append(layer)
    return tuple((layers[0], len(layers)) for layers in kinds.values())


@lru_cache(maxsize=4096)
def _share(
    spec: ModelSpec, adapter: LoRAPlan | None, width: int, tp: int, shards: int, stage: Stage
) -> Share:
    def total(params: tuple[Param, ...]) -> tuple[float, int, int, int]:
        stored = [t for param in params for t in tensors(param, adapter, width, tp)]
        return (
            sum(held(t.shape, shards) * t.bytes for t in stored),
            sum(held(t.shape, shards) for t in stored if t.trainable),
            sum(t.size for t in stored),
            sum(t.size for t in stored if t.trainable),
        )

    kinds = [spec.is_sparse(layer) for layer in stage.layers]
    layers = {kind: total(_layer_params(spec, kind)) for kind in set(kinds)}
    root = total(tuple(p for p in schema(spec) if p.layer is None and stage.owns(spec, p)))
    return Share(
        layers=len(kinds),
        weight_bytes=round(root[0] + sum(layers[kind][0] for kind in kinds)),
        trainable=root[1] + sum(layers[kind][1] for kind in kinds),
        layer=max(size[2] for size in layers.values()),
        layer_trainable=max(size[3] for size in layers.values()),
        root=root[2],
        root_trainable=root[3],
    )


@lru_cache(maxsize=64)
def _layer_params(spec: ModelSpec, sparse: bool) -> tuple[Param, ...]:
    """Parameters of the first decoder layer that is sparse, or dense: all others are like it."""
    layers = range(spec.num_hidden_layers)
    first = next(layer for layer in layers if spec.is_sparse(layer) == sparse)
    return tuple(param for param in schema(spec) if param.layer == first)


def _has_adapter(param: Param, adapter: LoRAPlan) -> bool:
    module = param.name.split(".")[-2]
    return param.kind == "linear" and param.expert is None and module in adapter.targets
