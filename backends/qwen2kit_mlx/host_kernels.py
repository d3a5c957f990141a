"""Float32 products of the CPU device on NumPy's BLAS.

The Linux CPU wheel of MLX links the reference BLAS: one thread, about 2 GFLOP/s, where the
OpenBLAS inside NumPy reaches a hundred times that. MLX arrays share their memory with NumPy, so
handing a product over copies only its result. Norms, rotations, activations, quantised products
with one row and the cache stay in MLX. Not used on macOS, where MLX has Accelerate, nor for
16-bit dtypes, which NumPy has no BLAS for.

Shape suffixes as in `kernels`; G query heads per kv head.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit_mlx.kernels import Mask, NativeKernels

_SCORES_PER_BLOCK = 1 << 24  # attention scores held at a time: 64 MiB
Floats = NDArray[np.float32]


class HostKernels(NativeKernels):
    """`Kernels` whose dense products run on NumPy; results are ready when a call returns."""

    lazy = False

    def __init__(self) -> None:
        super().__init__(fuse=False)

    def linear(self, x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
        """See `Kernels.linear`."""
        rows = np.asarray(x).reshape(-1, x.shape[-1])
        out = rows @ np.asarray(weight).T
        if bias is not None:
            out += np.asarray(bias)
        return mx.array(out.reshape(*x.shape[:-1], -1))

    def affine_linear(
        self,
        x: mx.array,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
    ) -> mx.array:
        """See `Kernels.affine_linear`; several rows are cheaper with the weight unpacked once."""
        if x.size <= 2 * x.shape[-1]:
            return super().affine_linear(x, weight, bits, group_size)
        dense = mx.dequantize(*weight, group_size=group_size, bits=bits)
        return self.linear(x, dense, None)

    def attention(
        self, q_BHTC: mx.array, k_BKSC: mx.array, v_BKSC: mx.array, scale: float, mask: Mask
    ) -> mx.array:
        """See `Kernels.attention`. Queries are taken in blocks that bound the score matrix."""
        batch, heads, queries, width = q_BHTC.shape
        kv_heads, slots = k_BKSC.shape[1], k_BKSC.shape[2]
        group = heads // kv_heads
        q = (np.asarray(q_BHTC) * np.float32(scale)).reshape(batch, kv_heads, group, queries, width)
        k, v = np.asarray(k_BKSC)[:, :, None], np.asarray(v_BKSC)[:, :, None]
        block = max(1, _SCORES_PER_BLOCK // (batch * heads * slots))
        out = np.empty_like(q)
        for start in range(0, queries, block):
            end = min(start + block, queries)
            seen = slots - queries + end if isinstance(mask, str) else slots
            scores = q[..., start:end, :] @ k[..., :seen, :].swapaxes(-1, -2)
            hidden = _hidden(mask, start, end, seen)
            if hidden is not None:
                np.copyto(scores, np.float32(-np.inf), where=hidden)
            out[..., start:end, :] = _softmax(scores) @ v[..., :seen, :]
        return mx.array(out.reshape(batch, heads, queries, width))


def _hidden(mask: Mask, start: int, end: int, seen: int) -> NDArray[np.bool_] | None:
    """What queries ``start:end`` must not see of ``seen`` slots, ready for [B, K, G, T, S]."""
    if mask is None:
        return None
    if isinstance(mask, str):
        own = np.arange(seen - (end - start), seen)
        return np.asarray(np.arange(seen)[None, :] > own[:, None])
    visible = np.asarray(mask)
    if visible.shape[-2] > 1:
        visible = visible[..., start:end, :]
    return np.asarray(~visible[:, :, None])


def _softmax(scores: Floats) -> Floats:
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
