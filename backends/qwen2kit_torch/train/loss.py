"""Summed cross-entropy of a linear head without ever holding all logits.

Gradients are formed chunk by chunk in the forward pass, while a chunk's logits exist, so that
backward costs no second head product. Shapes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, chunk: int, dtype: torch.dtype
) -> Tensor:
    """``sum_n -log softmax(hidden @ weight.T)[labels]`` in nats, a float32 scalar.

    Args:
        hidden_ND: final hidden states of the supervised positions only.
        weight_VD: head matrix.
        labels_N: int64 targets, all valid.
        chunk: positions whose logits exist at once.
        dtype: of the matrix products; the softmax is always float32.
    """
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden_ND, weight_VD, labels_N, chunk, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        weight = weight_VD.to(dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if wants_grad else None
        grad_weight = torch.zeros_like(weight_VD) if wants_grad else None
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden, labels = hidden_ND[part].to(dtype), labels_N[part, None]
            logits = (hidden @ weight.T).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(-1, labels)).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, in the logits' own memory.
            slope = logits.sub_(normaliser).exp_()
            slope.scatter_add_(-1, labels, torch.full_like(normaliser, -1.0))
            slope = slope.to(dtype)
            grad_hidden[part] = slope @ weight
            grad_weight += slope.T @ hidden
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None, None, None
