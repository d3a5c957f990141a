"""Fully sharded data parallelism (FSDP2): one unit per decoder layer, one for the rest."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qwen2kit_torch.model import DecoderLayer


def shard(root: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype, keep: bool) -> None:
    """Divide all parameters of ``root`` over ``mesh``; weights stay float32, travel in ``dtype``.

    Gradients are summed (not averaged) in float32, since losses are already divided by the
    number of supervised tokens of the global batch.

    Args:
        root: the module whose forward pass computes the loss or one pipeline stage.
        mesh: one-dimensional, or (replicate, shard) for HSDP.
        keep: keep gathered weights from the forward to the backward pass, as a pipeline's many
            micro-batches want it.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layers = [module for module in root.modules() if isinstance(module, DecoderLayer)]
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        if mesh.device_type == "cpu":
            # gloo has no pre-multiplied sum.
            module.set_force_sum_reduction_for_comms(True)
