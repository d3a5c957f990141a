"""SwiGLU and its gradient in Triton, elementwise over rows whose halves are gate and up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 1024


def forward(joint: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32, rounded once: ``[..., 2 F] -> [..., F]``, contiguous."""
    out = joint.new_empty(*joint.shape[:-1], joint.shape[-1] // 2)
    if out.numel():
        width = out.shape[-1]
        blocks = triton.cdiv(width, _LANES)
        _forward[(out.numel() // width * blocks,)](joint, out, width, blocks, _LANES)
    return out


def backward(slope: Tensor, joint: Tensor) -> Tensor:
    """The gradient by ``joint``, whose result has the gradient ``slope``; both contiguous."""
    gradient = torch.empty_like(joint)
    if slope.numel():
        width = slope.shape[-1]
        blocks = triton.cdiv(width, _LANES)
        grid = (slope.numel() // width * blocks,)
        _backward[grid](slope, joint, gradient, width, blocks, _LANES)
    return gradient


@triton.jit  # type: ignore[untyped-decorator]
def _forward(joint, out, width, blocks, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    inside = lane < width
    joint += row * 2 * width
    gate = tl.load(joint + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joint + width + lane, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + lane, product.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(slope, joint, gradient, width, blocks, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    inside = lane < width
    joint += row * 2 * width
    gradient += row * 2 * width
    d = tl.load(slope + row * width + lane, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(joint + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joint + width + lane, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    by_gate = d * up * share * (1 + gate * (1 - share))
    kind = gradient.dtype.element_ty
    tl.store(gradient + lane, by_gate.to(kind), mask=inside)
    tl.store(gradient + width + lane, (d * gate * share).to(kind), mask=inside)
