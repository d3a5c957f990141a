"""The Qwen2 decoder in MLX. It knows nothing of files, devices or sampling.

Shape suffixes: B rows, T tokens per row, N = B * T, D hidden, G stacked heads (query, key, value),
C head size, F feed-forward width (gate and up stacked: 2F), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.attention import Attend, Heads
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.linear import Matrix, Single
from qwen2kit_mlx.rotary import Rotary

FEW = 64
"""Rows up to which the parts between attentions run compiled. That spares the host most of the
work of a step, and takes a compilation for every number of rows that occurs."""

Between = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParams:
    """Parameters of one decoder layer; ``qkv`` and ``gate_up`` are stacked matrices."""

    input_norm: mx.array
    qkv: Matrix
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
        self.heads = Heads(spec, Rotary(spec, dtype), kernels, dtype)
        self._between: list[Between] = [
            partial(self._between_attention, index) for index in range(len(params.layers))
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
        stacked = self._stacked(0, x_ND)
        for index, between in enumerate(steps):
            heads_BTGC = stacked.reshape(rows, count, -1, self.spec.head_dim)
            x_ND, stacked = between(x_ND, attend(index, heads_BTGC))
            if trace is not None:
                trace.append(x_ND)
        return x_ND

    def final_norm(self, x: mx.array) -> mx.array:
        """The final RMSNorm of ``[..., D]``."""
        return self._norm(x, self.params.norm)

    def logits(self, x: mx.array) -> mx.array:
        """``[..., D]`` from `__call__` to logits ``[..., V]`` in the compute dtype."""
        return self.params.head(self.final_norm(x))

    def _stacked(self, index: int, x_ND: mx.array) -> mx.array:
        """Queries, keys and values ``[N, G * C]`` of a layer."""
        layer = self.params.layers[index]
        return layer.qkv(self._norm(x_ND, layer.input_norm))

    def _between_attention(
        self, index: int, x_ND: mx.array, attended: mx.array
    ) -> tuple[mx.array, mx.array]:
        """From a layer's attention to the next one's: the layer's output, and what the next
        attention takes (after the last layer, the output again)."""
        layer = self.params.layers[index]
        x_ND = layer.o(attended, x_ND)
        stacked_N2F = layer.gate_up(self._norm(x_ND, layer.post_norm))
        x_ND = layer.down(self.kernels.swiglu(*mx.split(stacked_N2F, 2, axis=-1)), x_ND)
        last = index + 1 == len(self.params.layers)
        return x_ND, x_ND if last else self._stacked(index + 1, x_ND)

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, self.spec.rms_norm_eps)
