"""Activation checkpointing: what the backward pass computes again instead of remembering.

``full`` keeps only a layer's input (arXiv 1604.06174); ``selective`` keeps the results of matrix
products, attention and communication, and repeats the cheap rest (arXiv 2205.05198). The second
products of adapters belong to that: so short an inner dimension is multiplied again sooner than its
result is read back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qwen2kit.backend.plan import Recompute
from qwen2kit_torch.model import DecoderLayer

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
}
_KEPT_BY_NAME = (
    "torch_attn._varlen_attn",
    "qwen2kit.flash_attention",
    "qwen2kit.nf4_linear",
    "qwen2kit.linear",
)


def recompute(layer: DecoderLayer, mode: Recompute, *, rank: int | None = None) -> None:
    """Replace ``layer.forward`` by one that checkpoints as ``mode`` says.

    Args:
        rank: of the layer's adapters, if it has any.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts, partial(_policy, rank)
        )
    layer.forward = partial(checkpoint, layer.forward, **options)  # type: ignore[method-assign]


def _policy(
    rank: int | None, context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    kept = operation in _KEPT or str(operation).startswith(_KEPT_BY_NAME)
    if operation is _aten.mm.default and args[0].shape[-1] == rank:
        kept = False
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
