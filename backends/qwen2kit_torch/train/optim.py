"""AdamW over the schema's decay groups, and the global gradient norm of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2kit.backend.plan import AdamWPlan

# As in `torch.nn.utils.clip_grad_norm_`.
_EPSILON = 1e-6


def build_adamw(parameters: Mapping[str, nn.Parameter], plan: AdamWPlan) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) of the parameters that train; weight decay applies to matrices.

    The learning rate is set with every step, by `guarded_step`.
    """
    trained = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if (p.dim() > 1) == decays],
            "weight_decay": plan.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=plan.betas, eps=plan.eps, fused=True)


def global_norm(
    parameters: Iterable[nn.Parameter],
    *,
    copies: Sequence[nn.Parameter] = (),
    pipeline: dist.ProcessGroup | None = None,
) -> Tensor:
    """L2 norm of all gradients together, float32 scalar, the same on every process.

    Args:
        parameters: of this process, ``copies`` included.
        copies: parameters that another pipeline stage counts.
        pipeline: the stages whose parameters count together.
    """
    counted = [p for p in parameters if not any(p is copy for copy in copies)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in counted if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline is not None:
        square = norm.square()
        dist.all_reduce(square, group=pipeline)
        norm = square.sqrt()
    return norm


def guarded_step(
    optimizer: torch.optim.AdamW,
    lr: float,
    *,
    loss: Tensor,
    norm: Tensor,
    max_norm: float,
    max_loss: float,
) -> Tensor:
    """A step with clipped gradients, unless ``loss`` or ``norm`` is bad: the device decides.

    Nothing waits for the device here. AdamW's fused kernel does both as it does for loss scaling:
    it divides gradients by ``grad_scale`` while it reads them, and changes nothing, its count of
    steps included, where ``found_inf`` is 1.

    Args:
        lr: learning rate of all groups.
        loss: float32 scalar.
        norm: of the gradients, float32 scalar.
        max_norm: the gradients' norm is scaled down to it; 0 leaves them alone.
        max_loss: above it the step is left out, as where loss or norm is not finite.

    Returns:
        float32 ``[3]``: loss, norm, and 1 if the step was taken, else 0.
    """
    taken = loss.isfinite() & norm.isfinite() & (loss <= max_loss)
    for group in optimizer.param_groups:
        group["lr"] = lr
    state: Any = optimizer
    state.found_inf = (~taken).float()
    state.grad_scale = ((norm + _EPSILON) / max_norm).clamp(min=1.0) if max_norm > 0 else None
    optimizer.step()
    return torch.stack((loss, norm, taken.float()))
