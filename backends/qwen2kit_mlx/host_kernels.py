"""Products of the CPU device on NumPy's BLAS.

The Linux CPU wheel of MLX links the reference BLAS: one thread, about 2 GFLOP/s, where the
OpenBLAS inside NumPy reaches a hundred times that. MLX arrays share their memory with NumPy, so
handing a float32 product over copies only its result. 16-bit operands are widened first, which
is exact and still cheaper than MLX's own 16-bit products; results are rounded back. Norms,
rotations, activations, packed products with few rows and the cache stay in MLX. Not used on
macOS, where MLX has Accelerate.

Shape suffixes as in `kernels`; G query heads per kv head.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit_mlx.kernels import Mask, NativeKernels, added

_SCORES_PER_BLOCK = 1 << 24  # attention scores held at a time: 64 MiB
Floats = NDArray[np.float32]


class HostKernels(NativeKernels):
    """`Kernels` whose dense products run on NumPy; results are ready when a call returns."""

    lazy = False
    stacks = False

    def __init__(self) -> None:
        super().__init__(fuse=False)

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
        """See `Kernels.linear`."""
        out = _host(x) @ _host(weight)
        if added is not None:
            out += _host(added)
        return mx.array(out).astype(x.dtype)

    def affine_linear(
        self,
        x: mx.array,
        weight: tuple[mx.array, mx.array, mx.array],
        bits: int,
        group_size: int,
        bias: mx.array | None = None,
        onto: mx.array | None = None,
    ) -> mx.array:
        """See `Kernels.affine_linear`; several rows are cheaper with the weight unpacked once."""
        packed, scales, biases = weight[0], _wide(weight[1]), _wide(weight[2])
        if x.size <= 2 * x.shape[-1]:
            wide = (packed, scales, biases)
            y = super().affine_linear(_wide(x), wide, bits, group_size).astype(x.dtype)
        else:
            y = self.linear(x, mx.dequantize(packed, scales, biases, group_size, bits).T, None)
        return added(y, bias, onto)

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        """See `Kernels.swiglu`."""
        wide = _host(gate)
        share = np.negative(wide)
        with np.errstate(over="ignore"):  # infinity is right: the gate is shut
            np.exp(share, out=share)
        share += np.float32(1)
        np.divide(wide, share, out=share)
        share *= _host(up)
        return mx.array(share).astype(gate.dtype)

    def log_sum_exp(self, logits_NV: mx.array) -> mx.array:
        """See `Kernels.log_sum_exp`; NumPy adds pairwise."""
        logits = _host(logits_NV)
        peak_N1 = logits.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # rows that are not finite are marked by the result
            powers = logits - peak_N1
            np.exp(powers, out=powers)
        return mx.array(np.log(powers.sum(axis=-1)) + peak_N1[:, 0])

    def attention(
        self, q_BHTC: mx.array, k_BKSC: mx.array, v_BKSC: mx.array, scale: float, mask: Mask
    ) -> mx.array:
        """See `Kernels.attention`. Queries are taken in blocks that bound the score matrix."""
        batch, heads, queries, width = q_BHTC.shape
        kv_heads, slots = k_BKSC.shape[1], k_BKSC.shape[2]
        group = heads // kv_heads
        q = (_host(q_BHTC) * np.float32(scale)).reshape(batch, kv_heads, group, queries, width)
        k, v = _host(k_BKSC)[:, :, None], _host(v_BKSC)[:, :, None]
        block = max(1, _SCORES_PER_BLOCK // (batch * heads * slots))
        out: Floats = np.empty(q.shape, dtype=np.float32)
        for start in range(0, queries, block):
            end = min(start + block, queries)
            seen = slots - queries + end if isinstance(mask, str) else slots
            scores = np.asarray(
                q[..., start:end, :] @ k[..., :seen, :].swapaxes(-1, -2), dtype=np.float32
            )
            hidden = _hidden(mask, start, end, seen)
            if hidden is not None:
                np.copyto(scores, np.float32(-np.inf), where=hidden)
            out[..., start:end, :] = _softmax(scores) @ v[..., :seen, :]
        return mx.array(out.reshape(batch, heads, queries, width)).astype(q_BHTC.dtype)


def _wide(array: mx.array) -> mx.array:
    return array if array.dtype == mx.float32 else array.astype(mx.float32)


def _host(array: mx.array) -> Floats:
    return np.asarray(_wide(array))


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
