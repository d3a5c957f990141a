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

_SUM_BLOCK = 512  # terms added up in one go


class Kernels(Protocol):
    """Matrix products and attention of one device and dtype.

    Attributes:
        lazy: whether results are computed in the background, so that building the next step
            while the current token is handed out gains time.
        compiles: whether the code between attentions is worth compiling.
        pads: whether attention is prepared anew for every shape, so that shapes should repeat.
        stacks: whether matrices that read the same input are worth merging into one (fewer
            launches), at the price of another copy at load time.
        paces: whether results of a large pass pile up unless its later layers wait for earlier
            ones.
    """

    lazy: bool
    compiles: bool
    pads: bool
    stacks: bool
    paces: bool

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
        bias: mx.array | None = None,
        onto: mx.array | None = None,
    ) -> mx.array:
        """``x @ w.T + bias + onto`` with ``w`` packed as (values, scales, biases) in MLX affine
        quantisation, ``bias`` ``[out]`` and ``onto`` ``[N, out]``."""
        ...

    def affine_swiglu(
        self, x: mx.array, weight: tuple[mx.array, mx.array, mx.array], bits: int, group_size: int
    ) -> mx.array:
        """`swiglu` ``[N, out / 2]`` of the first and the second half of `affine_linear`."""
        ...

    def expect(
        self, weight: tuple[mx.array, mx.array, mx.array], bits: int, group_size: int
    ) -> None:
        """These packed weights will be multiplied soon."""
        ...

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        """``silu(gate) * up``, elementwise."""
        ...

    def log_sum_exp(self, logits_NV: mx.array) -> mx.array:
        """``[N]`` from float32 ``[N, V]``, within 1e-5 for large vocabularies too."""
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
    paces = False

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
        bias: mx.array | None = None,
        onto: mx.array | None = None,
    ) -> mx.array:
        """See `Kernels.affine_linear`."""
        packed, scales, biases = weight
        y = mx.quantized_matmul(
            x, packed, scales, biases, transpose=True, group_size=group_size, bits=bits
        )
        return added(y, bias, onto)

    def affine_swiglu(
        self, x: mx.array, weight: tuple[mx.array, mx.array, mx.array], bits: int, group_size: int
    ) -> mx.array:
        """See `Kernels.affine_swiglu`."""
        return gated(self, self.affine_linear(x, weight, bits, group_size))

    def expect(
        self, weight: tuple[mx.array, mx.array, mx.array], bits: int, group_size: int
    ) -> None:
        """See `Kernels.expect`; nothing needs preparing."""

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        """See `Kernels.swiglu`."""
        return self._swiglu(gate, up)

    def log_sum_exp(self, logits_NV: mx.array) -> mx.array:
        """See `Kernels.log_sum_exp`. One float32 sum over 150 thousand terms can be off by 7e-4
        nats; so blocks are summed, then their sums."""
        count, vocab = logits_NV.shape
        padded = mx.pad(logits_NV, [(0, 0), (0, -vocab % _SUM_BLOCK)], constant_values=-mx.inf)
        blocks = mx.logsumexp(padded.reshape(count, -1, _SUM_BLOCK), axis=-1)
        return mx.logsumexp(blocks, axis=-1)

    def mask(self, visible: mx.array, dtype: mx.Dtype) -> mx.array:
        """See `Kernels.mask`."""
        del dtype
        return visible

    def attention(
        self, q_BHTC: mx.array, k_BKSC: mx.array, v_BKSC: mx.array, scale: float, mask: Mask
    ) -> mx.array:
        """See `Kernels.attention`."""
        return mx.fast.scaled_dot_product_attention(q_BHTC, k_BKSC, v_BKSC, scale=scale, mask=mask)


def added(y_NO: mx.array, bias: mx.array | None, onto: mx.array | None) -> mx.array:
    """``onto + (y + bias)``, of what there is."""
    y_NO = y_NO if bias is None else y_NO + bias
    return y_NO if onto is None else onto + y_NO


def gated(kernels: Kernels, y_N2F: mx.array) -> mx.array:
    """`Kernels.swiglu` ``[N, F]`` of the first and the second half of each row."""
    return kernels.swiglu(*mx.split(y_N2F, 2, axis=-1))


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up
