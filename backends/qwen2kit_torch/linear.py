"""A linear layer that, without gradients, picks the fastest kernel of an x86 CPU, and in training
on CUDA, where it is told to, the fastest algorithm of cuBLASLt.

PyTorch sends float32 products to MKL. On the AMD machine where this was measured oneDNN reads the
same weights 1.1 to 2 times as fast, except for small matrices. For bfloat16, weights in oneDNN's
blocked layout (`pack`) are 1.6 times as fast as plain ones.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2kit_torch.fused.products import linear_onto


class Linear(nn.Linear):
    """``x @ weight.T + bias``; parameters are created uninitialised.

    Args:
        inputs: size of the last dimension of ``x``.
        outputs: size of the result's.
        device: where the parameters live; may be ``meta``.
        dtype: of the parameters.
        bias: whether there is one.

    Attributes:
        tuned: compute products and their gradients by `qwen2kit_torch.fused.products`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        bias: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, device=device, dtype=dtype)
        self.tuned = False
        self._packed: Tensor | None = None

    def reset_parameters(self) -> None:
        """Leave the parameters as they are: they are loaded or initialised from the schema."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]``."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias ``[outputs]``, or without one."""
        if self.tuned:
            return linear_onto(x, self.weight, bias, None)
        if not torch.is_grad_enabled():
            if self._packed is not None:
                return packed_linear(x, self._packed, bias)
            return linear(x, self.weight, bias)
        return F.linear(x, self.weight, bias)

    def pack(self) -> None:
        """Move a frozen weight into oneDNN's blocked layout, if that helps on this device.

        The plain weight is dropped; `dense_weight` restores it exactly.
        """
        if self._packed is None:
            self._packed = pack(self.weight)
        if self._packed is not None:
            self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)

    def discard(self) -> None:
        """Forget a packed weight, before a new plain one is assigned."""
        self._packed = None

    def dense_weight(self) -> Tensor:
        """The weight ``[outputs, inputs]``, unpacked if need be."""
        return self.weight.detach() if self._packed is None else self._packed.to_dense()


def joint(x: Tensor, *linears: Linear) -> Tensor:
    """The outputs of several layers on one input, side by side, as one matrix product.

    The weights are joined on the fly, which costs no more than their cast to the compute dtype
    once the caller is compiled.
    """
    weight = torch.cat([layer.weight for layer in linears])
    biases = [cast(Tensor, layer.bias) for layer in linears if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    if linears[0].tuned:
        return linear_onto(x, weight, bias, None)
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with plain weights; not differentiable on every path."""
    if weight.dtype == torch.float32 and weight.numel() >= _WORTHWHILE and _usable(weight):
        return packed_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def pack(weight: Tensor) -> Tensor | None:
    """``weight`` in oneDNN's opaque blocked layout, or None where plain is as good or trains."""
    if weight.requires_grad or weight.dtype != torch.bfloat16 or not _usable(weight):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_TOKENS)
    return packed


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN; ``weight`` may be plain or from `pack`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# Below this many elements MKL's shorter call wins.
_WORTHWHILE = 1 << 18

# The layout oneDNN chooses for many tokens is also its best for one.
_PACK_FOR_TOKENS = 512


def _usable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and _has_onednn()


@cache
def _has_onednn() -> bool:
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
