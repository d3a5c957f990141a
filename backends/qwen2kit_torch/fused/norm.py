"""RMSNorm with what stands around it: the residual sum before it, the residual gradient after.

Left to torch.compile the backward pass of a norm is two kernels over the same rows, one for the
gradient of the rows and one for that of the weight. Here one kernel reads the gradient of the
normalised rows, the gradient that comes past the norm, and the rows, and writes the gradient of
the rows. Shapes: N rows (any leading dimensions), D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` to be carried on, and ``weight * x / sqrt(mean(x^2) + eps)`` in its dtype.

    Go on with the first result instead of ``x``: its gradient joins the other's in one pass.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, any float dtype.
        eps: added to the mean square.
    """
    found: tuple[Tensor, Tensor] = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return found


def added_and_normed(
    x: Tensor, update: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``x + update``, and its norm; as `normed`."""
    found: tuple[Tensor, Tensor] = _AddNorm.apply(x, update, weight, eps)  # type: ignore[no-untyped-call]
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return x.view_as(x), out

    @staticmethod
    def backward(ctx: Any, past: Tensor, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradient(slope, past, *ctx.saved_tensors), None)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out, scale = _add_norm(x, update, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, out

    @staticmethod
    def backward(ctx: Any, past: Tensor, slope: Tensor) -> tuple[Tensor | None, ...]:
        by_total, by_weight = _gradient(slope, past, *ctx.saved_tensors)
        return by_total, by_total, by_weight, None


@torch.library.custom_op("qwen2kit::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        from qwen2kit_torch.fused.norm_kernel import norm

        return norm(x.contiguous(), weight, eps)
    wide = x.float()
    scale = (wide.square().mean(-1) + eps).rsqrt()
    # Rounded before the weight multiplies, as `RMSNorm` does it.
    rounded = (wide * scale[..., None]).to(x.dtype)
    return (weight.float() * rounded.float()).to(x.dtype), scale


@torch.library.custom_op("qwen2kit::add_rms_norm", mutates_args=())
def _add_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        from qwen2kit_torch.fused.norm_kernel import add_norm

        return add_norm(x.contiguous(), update.contiguous(), weight, eps)
    total = x + update
    return total, *_norm(total, weight, eps)


@torch.library.custom_op("qwen2kit::rms_norm_backward", mutates_args=())
def _gradient(
    slope: Tensor, past: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        from qwen2kit_torch.fused.norm_kernel import gradient

        return gradient(slope.contiguous(), past.contiguous(), x.contiguous(), weight, scale)
    wide, unit = slope.float(), x.float() * scale[..., None]
    by_weight = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype)
    wide = wide * weight.float()
    along = (wide * unit).mean(-1, keepdim=True)
    by_x = scale[..., None] * (wide - unit * along)
    return (by_x + past.float()).to(x.dtype), by_weight


@_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_norm.register_fake
def _(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_norm(x, weight, eps)


@_gradient.register_fake
def _(
    slope: Tensor, past: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)
