"""`Kernels` of MLX's CUDA build."""

from __future__ import annotations

import mlx.core as mx

from qwen2kit_mlx.cuda_products import FEW, MOST, PackedProduct, dense_parts, fits
from qwen2kit_mlx.kernels import Mask, NativeKernels, added


class CUDAKernels(NativeKernels):
    """MLX along the paths where its CUDA build is fast, and our own product with packed weights.

    A product of one row has a matrix-vector kernel if nothing is added to it, and goes through
    cuBLAS otherwise. Attention with a mask has a kernel (cuDNN) in 16 bits, for masks that are
    added and for more than one query; cuDNN plans once per shape. In float32 it has one for up to
    three queries without a mask of their own, and is five operations for one query under a mask.

    Args:
        fuse: see `NativeKernels`.
        architecture: of the GPU, such as ``sm_90``; None leaves packed weights to MLX.
    """

    pads = True
    paces = True

    def __init__(self, *, fuse: bool, architecture: str | None = None) -> None:
        super().__init__(fuse=fuse)
        self._packed = None if architecture is None else PackedProduct(architecture)

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
        """See `Kernels.linear`."""
        if added is not None and x.shape[0] == 1:
            return x @ weight + added
        return super().linear(x, weight, added)

    def expect(
        self, weight: tuple[mx.array, mx.array, mx.array], bits: int, group_size: int
    ) -> None:
        """See `Kernels.expect`: decoding one sequence comes first."""
        width = weight[1].shape[1] * group_size
        if self._packed is not None and fits(width, bits, weight[1].dtype):
            self._packed.prepare(weight, bits, group_size)

    def affine_linear(
        self,
        x: mx.array,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
        bias: mx.array | None = None,
        onto: mx.array | None = None,
    ) -> mx.array:
        """See `Kernels.affine_linear` and `cuda_products`."""
        found = self._own(x, weight, bits, group_size, bias, onto)
        if found is not None:
            return found
        rows, width = x.shape
        if rows < FEW:
            return super().affine_linear(x, weight, bits, group_size, bias, onto)
        packed, scales, biases = weight
        parts = [
            self.linear(
                x,
                mx.dequantize(packed[some], scales[some], biases[some], group_size, bits).T,
                None if bias is None else bias[some],
            )
            for some in dense_parts(packed.shape[0], width, x.dtype.size)
        ]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return added(y, None, onto)

    def affine_swiglu(
        self, x: mx.array, weight: tuple[mx.array, mx.array, mx.array], bits: int, group_size: int
    ) -> mx.array:
        """See `Kernels.affine_swiglu`."""
        found = self._own(x, weight, bits, group_size, paired=True)
        return super().affine_swiglu(x, weight, bits, group_size) if found is None else found

    def _own(
        self,
        x: mx.array,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
        bias: mx.array | None = None,
        onto: mx.array | None = None,
        *,
        paired: bool = False,
    ) -> mx.array | None:
        """By our product (see `PackedProduct`), or None where it cannot be had."""
        rows, width = x.shape
        if self._packed is None or rows > MOST or not fits(width, bits, x.dtype):
            return None
        return self._packed(x, weight, bits, group_size, bias, onto, paired=paired)

    def mask(self, visible: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `Kernels.mask`."""
        return mx.where(visible, 0.0, -mx.inf).astype(dtype)

    def attention(
        self, q_BHTC: mx.array, k_BKSC: mx.array, v_BKSC: mx.array, scale: float, mask: Mask
    ) -> mx.array:
        """See `Kernels.attention`; query heads that share keys become queries of one head."""
        rows, heads, queries, width = q_BHTC.shape
        if queries > 1 or not isinstance(mask, mx.array):
            return super().attention(q_BHTC, k_BKSC, v_BKSC, scale, mask)
        q_BKGC = q_BHTC.reshape(rows, k_BKSC.shape[1], -1, width)
        out = super().attention(q_BKGC, k_BKSC, v_BKSC, scale, mask)
        return out.reshape(rows, heads, 1, width)
