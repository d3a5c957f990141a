"""AdamW over the schema's decay groups, and the global gradient norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen2kit.backend.plan import AdamWPlan
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema


def build_adamw(
    parameters: Mapping[str, torch.nn.Parameter], spec: ModelSpec, plan: AdamWPlan
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) whose weight decay applies where ``Param.decays`` says so.

    The learning rate is set before every step by `set_learning_rate`.
    """
    groups = [
        {
            "params": [parameters[p.name] for p in schema(spec) if p.decays == decays],
            "weight_decay": plan.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=plan.betas, eps=plan.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` for the next step of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Mapping[str, torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a global L2 norm of at most ``max_norm`` (0: leave them alone).

    Returns the norm before clipping.
    """
    limit = max_norm if max_norm > 0 else float("inf")
    return torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
