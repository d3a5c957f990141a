"""NF4: four bits a weight, for the frozen matrices of QLoRA (arXiv 2305.14314, section 3).

Sixty-four neighbours of the flattened matrix share one float32 ``absmax``; each weight over it is
rounded to the nearest of sixteen quantiles of the normal distribution. Two codes fill a byte, the
first in the high half: 4.5 bits a weight. ``absmax`` itself is not quantised again. Values and
layout are those of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2kit.errors import BackendError
from qwen2kit_torch.triton_support import has_triton

BLOCK = 64

# The largest quantile kept: halfway between 1 - 1/30 and 1 - 1/32 (to the digits published).
_TAIL = 0.9677083


def _codebook() -> tuple[float, ...]:
    """Sixteen values from -1 to 1, zero among them.

    Quantiles of N(0, 1) evenly spaced between ``_TAIL`` and 1/2, eight for the positive half and
    seven for the negative one, over the largest (section 3, equation 4, made asymmetric so that
    zero has a code).
    """
    normal = NormalDist()

    def half(count: int) -> list[float]:
        levels = torch.linspace(_TAIL, 0.5, count + 1)[:-1]
        return [normal.inv_cdf(float(level)) for level in levels]

    values = torch.tensor(sorted([*half(8), 0.0, *(-value for value in half(7))]))
    return tuple((values / values.max()).tolist())


CODEBOOK = _codebook()
"""The value of each code, ascending; exact in float32."""


def packed_sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Lengths of the packed codes (uint8) and of ``absmax`` (float32) for a matrix.

    Raises:
        BackendError: the elements do not divide into blocks.
    """
    size = prod(shape)
    if size % BLOCK:
        raise BackendError(
            f"a matrix of {list(shape)} does not divide into NF4 blocks of {BLOCK} weights; "
            "use adapter.quantize=none"
        )
    return size // 2, size // BLOCK


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` of any shape and float dtype as codes ``[n / 2]`` uint8 and ``absmax [n / 64]``.

    Raises:
        BackendError: the elements do not divide into blocks.
    """
    packed_sizes(weight.shape)
    blocks = weight.detach().reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(-1)
    scaled = blocks * (1.0 / absmax.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    values = torch.tensor(CODEBOOK)
    bounds = ((values[1:] + values[:-1]) / 2).to(weight.device)
    codes = torch.bucketize(scaled.view(-1), bounds, out_int32=True).to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantize(
    packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The matrix of ``shape``: code times ``absmax`` in float32, rounded once to ``dtype``."""
    if packed.is_cuda and has_triton():
        from qwen2kit_torch.lora_nf4_kernel import dequantize as in_one_pass

        return in_one_pass(packed, absmax, _values(packed.device), dtype).view(shape)
    pairs = F.embedding(packed.int(), _pairs(packed.device))
    return (pairs.view(-1, BLOCK) * absmax[:, None]).view(shape).to(dtype)


def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of ``x``, differentiable with respect to ``x`` alone.

    The dense weight ``[outputs, x.shape[-1]]`` exists during a product only: it is made again for
    the backward pass. To compilers this is one operator; if they saw inside, they would find the
    same weight in both passes and keep it.
    """
    product: Tensor = _product(x, packed, absmax, bias, outputs)
    return product


@torch.library.custom_op("qwen2kit::nf4_linear", mutates_args=())
def _product(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    return F.linear(x, dequantize(packed, absmax, (outputs, x.shape[-1]), x.dtype), bias)


@torch.library.custom_op("qwen2kit::nf4_linear_backward", mutates_args=())
def _gradient(slope: Tensor, packed: Tensor, absmax: Tensor, inputs: int) -> Tensor:
    return slope @ dequantize(packed, absmax, (slope.shape[-1], inputs), slope.dtype)


@_product.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@_gradient.register_fake
def _(slope: Tensor, packed: Tensor, absmax: Tensor, inputs: int) -> Tensor:
    return slope.new_empty(*slope.shape[:-1], inputs)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, _, _ = inputs
    ctx.save_for_backward(packed, absmax)
    ctx.inputs = x.shape[-1]


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(slope, *ctx.saved_tensors, ctx.inputs), None, None, None, None


_product.register_autograd(_backward, setup_context=_remember)


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOK, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """``[256, 2]`` float32: the two values of every byte."""
    bytes_ = torch.arange(256, device=device)
    return _values(device)[torch.stack([bytes_ >> 4, bytes_ & 15], -1)]
