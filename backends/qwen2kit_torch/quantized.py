"""Weights in 4 or 8 bits, ``w = scale * code + offset`` for every group of inputs.

The values are those of MLX's affine quantisation (`qwen2kit.weights.affine`), so that checkpoints
stored in it (or in AWQ's or GPTQ's runs of inputs) are kept as they are. The codes lie otherwise,
as tensor cores take them: four words hold ``128 / bits`` neighbours, and word ``j`` of them has
inputs ``8i + 2j`` and ``8i + 2j + 1`` at bit ``bits * i`` of its low and of its high half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2kit_torch.linear import Linear
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.triton_support import has_triton

BITS = (4, 8)
_EPSILON = 1e-7
_ROWS_AT_ONCE = 4096
_FEW_ROWS = 16
_LEAST_GROUP = 32


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix ``[N, D]``.

    Attributes:
        codes: int32 words ``[N, D * bits / 32]``.
        steps: scale and offset of every group, ``[N, D / group, 2]``.
        bits: 4 or 8.
        group: inputs that share a scale.
    """

    codes: Tensor
    steps: Tensor
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, D)``."""
        return len(self.codes), self.codes.shape[1] * 32 // self.bits

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix in ``dtype``, each value rounded once."""
        if self.codes.is_cuda and has_triton():
            from qwen2kit_torch.engine.packed_products import dequantize

            return dequantize(self, dtype)
        codes = from_words(self.codes, self.bits).view(len(self.codes), -1, self.group)
        scales, offsets = self.steps.float()[..., None].unbind(2)
        values = codes.float() * scales + offsets
        return values.to(dtype).view(self.shape)


class QuantizedLinear(Linear):
    """A `Linear` whose matrix is `Quantized`; it is expanded for a product with many rows.

    Once `pack` was called on a CPU, 4 bits in bfloat16 are read as they are by products with few
    rows (a second copy of the codes). For the others PyTorch has no product that is quicker than a
    dense one (`can_read`): they are then expanded for good, and the codes dropped.

    Args:
        base: the layer to replace, on the meta device.
        bits, group: as for `Quantized`.
    """

    steps: Tensor

    def __init__(self, base: Linear, *, bits: int, group: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bits, self.group, self.dtype = bits, group, base.weight.dtype
        self._packed, self.tuned = None, False
        self._for_cpu: tuple[Tensor, Tensor] | None = None
        self._expanded = False
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
        self.register_parameter("bias", base.bias)

    def fill(self, matrix: Quantized) -> None:
        """Take ``matrix``, whose bits and group become the layer's."""
        self.bits, self.group = matrix.bits, matrix.group
        self._for_cpu, self._packed, self._expanded = None, None, False
        self.weight = nn.Parameter(matrix.codes, requires_grad=False)
        self.steps = nn.Parameter(matrix.steps, requires_grad=False)

    @property
    def matrix(self) -> Quantized:
        """The weights."""
        return Quantized(self.weight.detach(), self.steps.detach(), self.bits, self.group)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., inputs] -> [..., outputs]``, see `Linear.product`."""
        if self._expanded:
            return super().product(x, bias)
        rows = x.reshape(-1, self.in_features)
        if self._for_cpu is None or len(rows) > _FEW_ROWS:
            return F.linear(x, self.matrix.dense(x.dtype), bias)
        codes, steps = self._for_cpu
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, self.group, steps)
        out = out if bias is None else out + bias
        return out.view(*x.shape[:-1], self.out_features)

    def pack(self) -> None:
        """Bring 4-bit codes into the layout of PyTorch's product for CPUs, or expand them."""
        if self._expanded or self._for_cpu is not None or self.weight.is_cuda:
            return
        matrix = self.matrix
        if can_read(self.bits, self.dtype) and self.out_features % 16 == 0:
            codes = from_words(matrix.codes, self.bits).int()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            # There a weight is (code - 8) * scale + zero.
            scales, offsets = matrix.steps.float().unbind(-1)
            steps = torch.stack([scales, offsets + 8 * scales], -1).transpose(0, 1)
            self._for_cpu = packed, steps.to(self.dtype).contiguous()
            return
        self._expanded = True
        self.weight = nn.Parameter(matrix.dense(self.dtype), requires_grad=False)
        nothing = torch.empty(0, dtype=self.dtype)
        self.steps = nn.Parameter(nothing, requires_grad=False)
        super().pack()

    def dense_weight(self) -> Tensor:
        """The matrix ``[outputs, inputs]`` in the compute dtype."""
        return super().dense_weight() if self._expanded else self.matrix.dense(self.dtype)


def can_read(bits: int, dtype: torch.dtype) -> bool:
    """Whether a CPU's product with codes is quicker than one with the expanded matrix.

    PyTorch's int4 product is vectorised for bfloat16 only (13 times as slow as a dense one in
    float32), and its int8 product takes one scale per row, not one per group.
    """
    return bits == 4 and dtype == torch.bfloat16


def quantize_layers(module: Qwen2, *, bits: int, group: int) -> None:
    """Let the decoder's matrices be filled in ``bits``; embedding and head stay dense.

    Those whose rows do not divide into whole groups stay dense too.
    """
    for owner in module.model.layers.modules():
        for name, child in list(owner.named_children()):
            if isinstance(child, Linear) and divides(child.in_features, group):
                setattr(owner, name, QuantizedLinear(child, bits=bits, group=group))


def divides(inputs: int, group: int) -> bool:
    """Whether a row of ``inputs`` codes makes whole groups (of whole chunks of four words)."""
    return inputs % group == 0 and group % _LEAST_GROUP == 0


def quantize(weight: Tensor, *, bits: int, group: int) -> Quantized:
    """Quantise ``[N, D]`` as MLX does; scales and offsets keep its dtype.

    The scale is fitted so that the end of the range farther from zero is hit exactly and zero
    itself stays representable.
    """
    parts = [_quantize(rows, bits, group) for rows in weight.split(_ROWS_AT_ONCE)]  # type: ignore[no-untyped-call]
    codes, scales, offsets = (torch.cat(part) for part in zip(*parts, strict=True))
    return Quantized(to_words(codes, bits), torch.stack([scales, offsets], -1), bits, group)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[N, D]`` as they are stored, int32 ``[N, D * bits / 32]``."""
    # chunk, i, j, half -> chunk, j, half, i
    cells = codes.view(len(codes), -1, 16 // bits, 4, 2).permute(0, 1, 3, 4, 2)
    if bits == 4:
        cells = cells[..., 0::2] | cells[..., 1::2] << 4
    return cells.reshape(len(codes), -1).view(torch.int32)


def from_words(words: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[N, D]`` of int32 words."""
    cells = words.view(torch.uint8).view(len(words), -1, 4, 2, 2)
    if bits == 4:
        cells = torch.stack([cells & 15, cells >> 4], -1).flatten(-2)
    return cells.permute(0, 1, 4, 2, 3).reshape(len(words), -1)


def _quantize(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    values = rows.float().view(len(rows), -1, group)
    top = (1 << bits) - 1
    high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
    scale = ((high - low) / top).clamp(min=_EPSILON)
    below = low.abs() > high.abs()
    scale = torch.where(below, scale, -scale)
    edge = torch.where(below, low, high)
    zero_code = (edge / scale).round()
    hit = zero_code != 0
    scale = torch.where(hit, edge / torch.where(hit, zero_code, 1), scale)
    offset = torch.where(hit, edge, 0)
    codes = ((values - offset) / scale).round().clamp(0, top).to(torch.uint8)
    scale, offset = scale.squeeze(-1).to(rows.dtype), offset.squeeze(-1).to(rows.dtype)
    return codes.view(len(rows), -1), scale, offset
