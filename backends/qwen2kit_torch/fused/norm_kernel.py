"""RMSNorm and its gradient in Triton: a program takes a few whole rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values that a program holds of each tensor, and how many programs share a multiprocessor.
_TILE, _PROGRAMS = 4096, 8


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised rows, and ``1 / sqrt(mean(x^2) + eps)`` of each, float32; ``x`` contiguous."""
    out, scale = _like(x)
    _run(_forward, x, x, x, weight, x, out, scale, eps, ADD=False)
    return out, scale


def add_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + update``, and as `norm` of it; both contiguous."""
    total = torch.empty_like(x)
    out, scale = _like(x)
    _run(_forward, x, x, update, weight, total, out, scale, eps, ADD=True)
    return total, out, scale


def gradient(
    slope: Tensor, past: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows, ``past`` added, and of the weight, from those of the normalised rows.

    Every program adds up its rows' share of the weight's gradient, float32.
    """
    by_x = torch.empty_like(x)
    width, programs = x.shape[-1], _most_programs(x)
    shares = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _run(_backward, x, slope, past, x, weight, scale, by_x, shares, programs=programs)
    return by_x, shares.sum(0).to(weight.dtype)


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _most_programs(x: Tensor) -> int:
    if not x.is_cuda:  # Triton's interpreter
        return 2
    return _PROGRAMS * int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def _run(kernel: Any, x: Tensor, *arguments: Any, programs: int = 0, **constants: Any) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    together = max(1, _TILE // block)
    grid = (programs or triton.cdiv(rows, together),)
    warps = max(4, min(16, together * block // 1024))
    kernel[grid](*arguments, rows, width, BLOCK=block, ROWS=together, num_warps=warps, **constants)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x, update, weight, total, out, scale, eps, rows, width,
    ADD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    place = row[:, None] * width + lane[None, :]
    inside = (row < rows)[:, None] & (lane < width)[None, :]
    kind = out.dtype.element_ty
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(kind)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(scale + row, inverse, mask=row < rows)
    w = tl.load(weight + lane, mask=lane < width, other=0.0).to(tl.float32)
    unit = (value * inverse[:, None]).to(kind).to(tl.float32)
    tl.store(out + place, (unit * w[None, :]).to(kind), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    slope, past, x, weight, scale, by_x, shares, rows, width,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    w = tl.load(weight + lane, mask=lane < width, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        place = row[:, None] * width + lane[None, :]
        inside = (row < rows)[:, None] & (lane < width)[None, :]
        inverse = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        d = tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
        unit = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * inverse
        carried = tl.load(past + place, mask=inside, other=0.0).to(tl.float32)
        share += tl.sum(d * unit, 0)
        d = d * w[None, :]
        along = tl.sum(d * unit, 1) / width
        found = inverse * (d - unit * along[:, None]) + carried
        tl.store(by_x + place, found.to(by_x.dtype.element_ty), mask=inside)
    tl.store(shares + tl.program_id(0) * width + lane, share, mask=lane < width)
