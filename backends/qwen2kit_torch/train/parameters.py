"""Parameters that may be DTensors: filling them from, and gathering them into, whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2kit.plan.stages import Stage
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit_torch.parallel.mesh import Mesh

Region = tuple[slice, ...]
"""A box within a tensor: first and last index of every dimension."""


def parts(parameter: Tensor) -> Iterator[tuple[Tensor, Region]]:
    """What this process holds of ``parameter``: local tensors, and where they lie in the whole."""
    if not isinstance(parameter, DTensor):
        yield parameter.detach(), tuple(slice(0, size) for size in parameter.shape)
        return
    local = parameter.to_local().detach()
    for chunk in parameter.__create_chunk_list__():  # type: ignore[no-untyped-call]
        spans = zip(chunk.offsets, chunk.sizes, strict=True)
        yield local, tuple(slice(start, start + size) for start, size in spans)


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy this process's part of ``whole`` (on the CPU, any dtype) into ``parameter``."""
    with torch.no_grad():
        for local, region in parts(parameter):
            local.copy_(whole[region])


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` undivided; collective over its mesh."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def settle_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Lay every gradient out as its parameter is; tensor parallelism leaves partial sums."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def gather(
    parameters: dict[str, nn.Parameter],
    spec: ModelSpec,
    places: tuple[Stage, ...],
    mesh: Mesh,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Every float32 parameter of the schema, whole, on every process, one at a time.

    Collective: all processes must exhaust the iterator together.
    """
    pipeline = mesh.group("pp")
    for param in schema(spec):
        if pipeline is None:
            yield param.name, whole(parameters[param.name])
            continue
        owner = next(place.index for place in places if place.owns(spec, param))
        mine = owner == mesh.rank("pp")
        value = whole(parameters[param.name]) if mine else torch.empty(param.shape, device=device)
        dist.broadcast(value, group=pipeline, group_src=owner)
        yield param.name, value
