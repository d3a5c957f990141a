"""AdamW over the schema's decay groups, and the global gradient norm of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2kit.backend.plan import AdamWPlan


def build_adamw(parameters: Mapping[str, nn.Parameter], plan: AdamWPlan) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) of the parameters that train; weight decay applies to matrices.

    The learning rate is set before every step by `set_learning_rate`.
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` for the next step of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    copies: Sequence[nn.Parameter] = (),
    pipeline: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale gradients to a global L2 norm of at most ``max_norm`` (0: leave them alone).

    Args:
        parameters: of this process, ``copies`` included.
        copies: parameters that another pipeline stage counts.
        pipeline: the stages whose parameters count together.

    Returns the norm before clipping.
    """
    everything = [p for p in parameters if p.grad is not None]
    counted = [p.grad for p in everything if not any(p is copy for copy in copies)]
    norm = torch.nn.utils.get_total_norm([g for g in counted if g is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline is not None:
        square = norm.square()
        dist.all_reduce(square, group=pipeline)
        norm = square.sqrt()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(everything, max_norm, norm)
    return norm
