"""Tensor and sequence parallelism as DTensor styles, derived from the schema's logical axes.

Between the matrix products the residual stream is divided along the sequence (arXiv 2205.05198):
norms work on ``T / tp`` tokens, attention and MLP gather the sequence on entry and scatter their
partial sums on exit.
"""

from __future__ import annotations

import logging

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from qwen2kit.plan.sharding import tensor_dim
from qwen2kit.spec.schema import Param
from qwen2kit_torch.model import MLP, Attention, Qwen2

_SEQUENCE = Shard(1)

# It calls two all-gathers in a row suboptimal, on every process; with FSDP there is no other way.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def parallelize(network: Qwen2, params: tuple[Param, ...], mesh: DeviceMesh) -> None:
    """Turn ``network``'s parameters into DTensors over ``mesh`` and hook in the communication.

    Args:
        network: on the meta device; may be one pipeline stage.
        params: the schema's parameters that it holds.
        mesh: one-dimensional, the ``tp`` axis.
    """
    styles = {
        param.name.rpartition(".")[0]: _style(param) for param in params if param.kind != "bias"
    }
    for name, block in network.named_modules():
        if isinstance(block, Attention):
            styles[name] = _gather_sequence(arguments=4)
        elif isinstance(block, MLP):
            styles[name] = _gather_sequence(arguments=1)
    # Outer modules first, so that the hooks of a block run before those of its projections.
    for name in sorted(styles, key=lambda name: name.count(".")):
        parallelize_module(network.get_submodule(name), mesh, styles[name], src_data_rank=None)


def _style(param: Param) -> ParallelStyle:
    divided = tensor_dim(param)
    if divided is None:
        return SequenceParallel()
    if param.kind == "embedding":
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=_SEQUENCE)
    if divided == 0:
        return ColwiseParallel()
    return RowwiseParallel(output_layouts=_SEQUENCE)


def _gather_sequence(*, arguments: int) -> PrepareModuleInput:
    rest = (None,) * (arguments - 1)
    return PrepareModuleInput(
        input_layouts=(_SEQUENCE, *rest), desired_input_layouts=(Replicate(), *rest)
    )
