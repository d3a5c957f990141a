"""Summed cross-entropy of a linear head without ever holding all logits.

Gradients are formed chunk by chunk in the forward pass, while a chunk's logits exist, so that
backward costs no second head product. With a vocabulary divided over processes every process has
its own columns of the logits; two scalars per position are exchanged (Megatron-LM, arXiv
1909.08053, section 3). Shapes: N positions, D hidden, V vocabulary (of this process).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2kit_torch.fused.products import accumulate_, multiply


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The rows of the head matrix that this process holds.

    Attributes:
        group: the processes that share the vocabulary.
        start: vocabulary id of this process's first row.
    """

    group: dist.ProcessGroup
    start: int


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk: int,
    dtype: torch.dtype,
    vocab: VocabShard | None = None,
    tuned: bool = False,
) -> Tensor:
    """``sum_n -log softmax(hidden @ weight.T)[labels]`` in nats, a float32 scalar.

    Args:
        hidden_ND: final hidden states of the supervised positions only.
        weight_VD: head matrix; with ``vocab``, this process's rows of it, and the gradient of
            ``hidden_ND`` is then a partial sum.
        labels_N: int64 targets, all valid.
        chunk: positions whose logits exist at once.
        dtype: of the matrix products; the softmax is always float32.
        vocab: which rows ``weight_VD`` has; None for all.
        tuned: compute products by `qwen2kit_torch.fused.products`.
    """
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden_ND, weight_VD, labels_N, chunk, dtype, vocab, tuned)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int,
        dtype: torch.dtype,
        vocab: VocabShard | None,
        tuned: bool,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight: Tensor | None = None
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden = hidden_ND[part].to(dtype)
            logits = multiply(hidden, weight, turn_b=True) if tuned else hidden @ weight.T
            losses, slope = _losses(
                logits, labels_N[part], vocab, slope=wants_hidden or wants_weight
            )
            total += losses.sum()
            if grad_hidden is not None:
                grad_hidden[part] = multiply(slope, weight) if tuned else slope @ weight
            if wants_weight:
                grad_weight = _accumulated(grad_weight, slope, hidden, tuned)
            # Or they would still be there while the next chunk's are made.
            del logits, slope, losses
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _losses(
    logits: Tensor, labels: Tensor, vocab: VocabShard | None, *, slope: bool
) -> tuple[Tensor, Tensor]:
    """Losses ``[N]`` and the gradient of their sum by ``logits``, in the logits' own memory."""
    if vocab is None and logits.is_cuda and logits.dtype == torch.bfloat16:
        from qwen2kit_torch.train.loss_kernel import cross_entropy_

        return cross_entropy_(logits, labels, slope=slope), logits
    wide = logits.float()
    normaliser, picked, inside, column = _statistics(wide, labels[:, None], vocab)
    losses = (normaliser - picked)[:, 0]
    # d loss / d logits = softmax - one-hot.
    wide = wide.sub_(normaliser).exp_()
    wide.scatter_add_(-1, column, torch.where(inside, -1.0, 0.0))
    return losses, wide.to(logits.dtype)


def _statistics(
    logits: Tensor, labels: Tensor, vocab: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log of the softmax's denominator, the label's logit, whether the label is among our
    columns, and which it is: each ``[N, 1]``."""
    if vocab is None:
        normaliser = logits.logsumexp(-1, keepdim=True)
        return normaliser, logits.gather(-1, labels), torch.ones_like(labels).bool(), labels
    column = labels - vocab.start
    inside = (column >= 0) & (column < logits.shape[-1])
    column = column.clamp(0, logits.shape[-1] - 1)
    peak = logits.amax(-1, keepdim=True)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=vocab.group)
    mass = (logits - peak).exp_().sum(-1, keepdim=True)
    picked = torch.where(inside, logits.gather(-1, column), 0.0)
    both = torch.cat((mass, picked), -1)
    dist.all_reduce(both, group=vocab.group)
    return peak + both[:, :1].log(), both[:, 1:], inside, column


def _accumulated(
    total_VD: Tensor | None, slope_NV: Tensor, hidden_ND: Tensor, tuned: bool
) -> Tensor:
    """``total + slope.T @ hidden`` in float32, in place; None is zero, without its bytes."""
    if total_VD is None and slope_NV.dtype == torch.float32:
        return slope_NV.T @ hidden_ND
    if slope_NV.dtype == torch.float32:
        assert total_VD is not None
        return total_VD.addmm_(slope_NV.T, hidden_ND)
    if not slope_NV.is_cuda:
        product = (slope_NV.T @ hidden_ND).float()
        return product if total_VD is None else total_VD.add_(product)
    if total_VD is None:
        return torch.mm(slope_NV.T, hidden_ND, out_dtype=torch.float32)
    if tuned:
        return accumulate_(total_VD, slope_NV, hidden_ND)
    return torch.addmm(total_VD, slope_NV.T, hidden_ND, out_dtype=torch.float32, out=total_VD)
