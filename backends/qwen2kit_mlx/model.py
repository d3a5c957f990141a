"""The Qwen2 decoder in MLX. It knows nothing of files, devices or sampling.

Shape suffixes: B rows, T tokens per row, N = B * T, D hidden, G stacked heads (query, key, value),
C head size, F feed-forward width (gate and up stacked: 2F), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.attention import Attend, Heads
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.linear import Matrix, Single
from qwen2kit_mlx.rotary import Rotary

FEW = 64
"""Rows up to which the parts between attentions run compiled. That spares the host most of the
work of a step, and takes a compilation for every number of rows that occurs."""

Step = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParams:
    """Parameters of one decoder layer; ``qkv`` and ``gate_up`` are stacked matrices.

    Attributes:
        anchor: the bias ``[K, C]`` that keys are computed without (see `rotary`), or None.
    """

    input_norm: mx.array
    qkv: Matrix
    anchor: mx.array | None
    o: Matrix
    post_norm: mx.array
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParams:
    """All parameters; a tied model has the same object as ``embed`` and ``head``."""

    embed: Single
    layers: tuple[LayerParams, ...]
    norm: mx.array
    head: Single


class Decoder:
    """The forward pass.

    Args:
        spec: a dense spec.
        params: parameters in one compute dtype.
        kernels: who computes products and attention.
        dtype: the compute dtype.

    Attributes:
        heads: what attention needs to know of the model.
    """

    def __init__(
        self, spec: ModelSpec, params: ModelParams, kernels: Kernels, dtype: mx.Dtype
    ) -> None:
        self.spec, self.params, self.kernels, self.dtype = spec, params, kernels, dtype
        layers = params.layers
        anchors = [layer.anchor for layer in layers if layer.anchor is not None]
        rotary = Rotary(spec, dtype, fuse=kernels.compiles)
        self.heads = Heads(spec, rotary, kernels, dtype, anchors or None)
        self._between: list[Step] = [
            Between(spec.rms_norm_eps, layer, following)
            for layer, following in zip(layers, (*layers[1:], None), strict=True)
        ]
        self._compiled = [mx.compile(step) for step in self._between] if kernels.compiles else []

    def __call__(
        self, tokens_BT: mx.array, attend: Attend, trace: list[mx.array] | None = None
    ) -> mx.array:
        """Residual stream ``[B * T, D]`` after the last layer, before the final norm.

        Args:
            tokens_BT: int32 ids.
            attend: where they stand, and what they see.
            trace: receives the embedding output and every layer's output.
        """
        rows, count = tokens_BT.shape
        x_ND = self.params.embed.embed(tokens_BT.reshape(-1))
        if trace is not None:
            trace.append(x_ND)
        steps = self._compiled if self._compiled and x_ND.shape[0] <= FEW else self._between
        stacked = stacked_heads(self.params.layers[0], x_ND, self.spec.rms_norm_eps)
        paced, before = self.kernels.paces and x_ND.shape[0] > FEW, x_ND
        for index, between in enumerate(steps):
            heads_BTGC = stacked.reshape(rows, count, -1, self.spec.head_dim)
            x_ND, stacked = between(x_ND, attend(index, heads_BTGC))
            if trace is not None:
                trace.append(x_ND)
            if paced:
                mx.async_eval(x_ND, stacked)  # type: ignore[no-untyped-call]
                mx.eval(before)
                before = x_ND
        return x_ND

    def final_norm(self, x: mx.array) -> mx.array:
        """The final RMSNorm of ``[..., D]``."""
        return mx.fast.rms_norm(x, self.params.norm, self.spec.rms_norm_eps)

    def logits(self, x: mx.array) -> mx.array:
        """``[..., D]`` from `__call__` to logits ``[..., V]`` in the compute dtype."""
        return self.params.head(self.final_norm(x))


class Between:
    """From one layer's attention to the next one's.

    Holds no `Decoder`: a model that is dropped gives its memory back at once, not when Python
    looks for cycles.

    Args:
        eps: of the norms.
        layer: whose attention was computed.
        following: the next layer, or None.
    """

    def __init__(self, eps: float, layer: LayerParams, following: LayerParams | None) -> None:
        self._eps = eps
        self._layer, self._following = layer, following

    def __call__(self, x_ND: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        """The layer's output, and what the next attention takes (after the last layer, the output
        again)."""
        layer = self._layer
        x_ND = layer.o(attended, x_ND)
        gated_NF = layer.gate_up.swiglu(mx.fast.rms_norm(x_ND, layer.post_norm, self._eps))
        x_ND = layer.down(gated_NF, x_ND)
        if self._following is None:
            return x_ND, x_ND
        return x_ND, stacked_heads(self._following, x_ND, self._eps)


def stacked_heads(layer: LayerParams, x_ND: mx.array, eps: float) -> mx.array:
    """Queries, keys and values ``[N, G * C]`` of a layer."""
    return layer.qkv(mx.fast.rms_norm(x_ND, layer.input_norm, eps))
