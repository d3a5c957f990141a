"""From a spec and a plan to the part of the model that this process trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from qwen2kit.backend.plan import TrainPlan
from qwen2kit.errors import BackendError
from qwen2kit.plan.stages import Stage, stage_params, stages
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import EMBED_TOKENS
from qwen2kit_torch.linear import Linear
from qwen2kit_torch.lora import add_lora
from qwen2kit_torch.model import MLP, Attention, DecoderLayer, Qwen2
from qwen2kit_torch.parallel.compilation import compile_layer
from qwen2kit_torch.parallel.float8 import use_float8
from qwen2kit_torch.parallel.fsdp import shard
from qwen2kit_torch.parallel.mesh import Mesh
from qwen2kit_torch.parallel.recompute import recompute
from qwen2kit_torch.parallel.tensor import parallelize
from qwen2kit_torch.train.stage import Arithmetic, TrainStage, prune


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What `build` made.

    Attributes:
        stage: the module to run.
        place: which pipeline stage it is.
        places: all stages.
        copies: names of parameters that another stage counts and saves (a tied head).
        compiled: whether layers are compiled, so that shapes should not vary.
    """

    stage: TrainStage
    place: Stage
    places: tuple[Stage, ...]
    copies: frozenset[str]
    compiled: bool


def build(
    network: Qwen2, plan: TrainPlan, mesh: Mesh, *, dtype: torch.dtype, device: torch.device
) -> Built:
    """Apply pipeline cut, adapters, tensor parallelism, recomputation, compilation and FSDP.

    Args:
        network: the whole model on the meta device; it is changed in place.
        dtype: compute dtype.
        device: where it will live; parameters are allocated there, uninitialised.

    Raises:
        BackendError: the plan combines what cannot be combined.
    """
    _check(plan)
    spec = network.spec
    places = stages(spec, mesh.size("pp"))
    place = places[mesh.rank("pp")]
    compiled = device.type == "cuda" if plan.compile is None else plan.compile
    tuned = plan.tune_products and device.type == "cuda" and dtype == torch.bfloat16
    prune(network, place)
    if plan.adapter is not None:
        add_lora(network, plan.adapter, dtype=dtype)
    if plan.float8:
        use_float8(network)
    if mesh.size("tp") > 1:
        parallelize(network, stage_params(spec, place), mesh["tp"])
    elif compiled:
        # Without recomputation joined weights would be kept, undivided, for the backward pass.
        _fuse(network, joint=mesh.size("fsdp") == 1 or plan.recompute != "none")
        _tune(network, tuned)
    arithmetic = Arithmetic(dtype=dtype, loss_chunk_tokens=plan.loss_chunk_tokens, tuned=tuned)
    stage = TrainStage(network, place, arithmetic, mesh)
    for layer in stage.layers:
        recompute(layer, plan.recompute, rank=plan.adapter.rank if plan.adapter else None)
        if compiled:
            compile_layer(layer)
    if mesh.size("fsdp") > 1 or mesh.size("dp_replicate") > 1:
        axes = ("dp_replicate", "fsdp") if mesh.size("dp_replicate") > 1 else "fsdp"
        shard(stage, mesh[axes], dtype=dtype, keep=place.count > 1)
    stage.to_empty(device=device)
    return Built(
        stage=stage,
        place=place,
        places=places,
        copies=_copies(spec, place),
        compiled=compiled,
    )


def ends_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """The first and the last pipeline stage of this process's column, which both hold a tied
    embedding; None on the stages between, or without a pipeline."""
    if mesh.size("pp") == 1:
        return None
    mine = None
    for column in mesh["pp", "dp_replicate", "fsdp", "tp"].mesh.flatten(1).T:
        ends = [int(column[0]), int(column[-1])]
        group = dist.new_group(ends)
        if dist.get_rank() in ends:
            mine = group
    return mine


def _copies(spec: ModelSpec, place: Stage) -> frozenset[str]:
    copied = spec.tie_word_embeddings and place.last and not place.first
    return frozenset({EMBED_TOKENS} if copied else ())


def _fuse(network: Qwen2, *, joint: bool) -> None:
    """Fewer passes over memory, where nothing but plain layers is in the way.

    Args:
        joint: join the weights of projections with the same input.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused = joint and type(module.q_proj) is Linear
        elif isinstance(module, MLP):
            module.fused = joint and type(module.gate_proj) is Linear
        elif isinstance(module, DecoderLayer):
            module.fused = all(p.requires_grad for p in module.parameters())


def _tune(network: Qwen2, tuned: bool) -> None:
    """Let plain layers that train choose how their products are computed."""
    for module in network.modules():
        if type(module) is Linear and module.weight.requires_grad:
            module.tuned = tuned


def _check(plan: TrainPlan) -> None:
    if plan.adapter is None:
        return
    if plan.float8:
        raise BackendError("adapters and float8 do not go together; set train.float8=false")
    if plan.parallel.tp > 1 or plan.parallel.pp > 1:
        raise BackendError(
            "adapters train with data and context parallelism only; set parallel.tp=1 and "
            "parallel.pp=1"
        )
