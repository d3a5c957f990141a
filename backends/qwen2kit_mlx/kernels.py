"""The two expensive products of a decoder, and which code computes them.

`Kernels` is the seam; `NativeKernels` uses MLX alone and is what runs on GPUs. The model, cache
and generation code do not know which one they were given.

Shape suffixes: B batch, T query positions, S cached positions, H query heads, K key/value heads,
C head size.
"""

from __future__ import annotations

from typing import Literal, Protocol

import mlx.core as mx

Mask = mx.array | Literal["causal"] | None


class Kernels(Protocol):
    """Matrix products and attention of one device and dtype.

    Attributes:
        lazy: whether results are computed in the background, so that building the next step
            while the current token is handed out gains time.
        compiles: whether the code between attentions is worth compiling.
        pads: whether attention is prepared anew for every shape, so that shapes should repeat.
        stacks: whether matrices that read the same input are worth merging into one (fewer
            launches), at the price of another copy at load time.
    """

    lazy: bool
    compiles: bool
    pads: bool
    stacks: bool

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
        """``x @ weight + added``: ``[N, in]``, ``[in, out]`` (transposed in memory), and
        ``[out]`` or ``[N, out]``."""
        ...

    def affine_linear(
        self,
        x: mx.array,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
    ) -> mx.array:
        """``x @ w.T`` with ``w`` packed as (values, scales, biases) in MLX affine quantisation."""
        ...

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        """``silu(gate) * up``, elementwise."""
        ...

    def mask(self, visible: mx.array, dtype: mx.Dtype) -> mx.array:
        """A mask for `attention` from booleans that broadcast to ``[B, 1, T, S]`` (true =
        visible); ``dtype`` is that of the queries."""
        ...

    def attention(
        self, q_BHTC: mx.array, k_BKSC: mx.array, v_BKSC: mx.array, scale: float, mask: Mask
    ) -> mx.array:
        """Softmax attention ``[B, H, T, C]``; query head ``h`` reads kv head ``h * K // H``.

        Args:
            mask: ``"causal"`` (queries are the last T of S positions), what `mask` gave, or None
                (all visible).
        """
        ...


class NativeKernels:
    """Everything by MLX.

    Args:
        fuse: compile elementwise chains into one kernel; worth it on GPUs only (on CPUs MLX calls
            the system's C++ compiler for it).
    """

    lazy = True
    pads = False
    stacks = True

    def __init__(self, *, fuse: bool) -> None:
        self.compiles = fuse
        self._swiglu = mx.compile(_swiglu, shapeless=True) if fuse else _swiglu

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
        """See `Kernels.linear`."""
        return x @ weight if added is None else mx.addmm(added, x, weight)

    def affine_linear(
        self,
        x: mx.array,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
    ) -> mx.array:
        """See `Kernels.affine_linear`."""
        packed, scales, biases = weight
        return mx.quantized_matmul(
            x, packed, scales, biases, transpose=True, group_size=group_size, bits=bits
        )

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        """See `Kernels.swiglu`."""
        return self._swiglu(gate, up)

    def mask(self, visible: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `Kernels.mask`."""
        del dtype
        return visible

    def attention(
        self, q_BHTC: mx.array, k_BKSC: mx.array, v_BKSC: mx.array, scale: float, mask: Mask
    ) -> mx.array:
        """See `Kernels.attention`."""
        return mx.fast.scaled_dot_product_attention(q_BHTC, k_BKSC, v_BKSC, scale=scale, mask=mask)


class CUDAKernels(NativeKernels):
    """MLX alone, along the paths where its CUDA build is fast.

    A product of one row has a matrix-vector kernel if nothing is added to it, and goes through
    cuBLAS otherwise. Attention with a mask has a kernel (cuDNN) for masks that are added and for
    more than one query; cuDNN plans once per shape.
    """

    pads = True

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
        """See `Kernels.linear`."""
        if added is not None and x.shape[0] == 1:
            return x @ weight + added
        return super().linear(x, weight, added)

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


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up
