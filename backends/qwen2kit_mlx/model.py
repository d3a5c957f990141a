"""The Qwen2 decoder in MLX. It knows nothing of files, devices or sampling.

Shape suffixes: B rows, T tokens per row, N = B * T, D hidden, G stacked heads (query, key, value),
C head size, F feed-forward width (gate and up stacked: 2F), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.attention import Attend, Heads
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.linear import Matrix, Single
from qwen2kit_mlx.rotary import Rotary


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
        for index, layer in enumerate(self.params.layers):
            stacked = layer.qkv(self._norm(x_ND, layer.input_norm))
            heads_BTGC = stacked.reshape(rows, count, -1, self.spec.head_dim)
            x_ND = layer.o(attend(index, heads_BTGC), x_ND)
            stacked_N2F = layer.gate_up(self._norm(x_ND, layer.post_norm))
            x_ND = layer.down(self.kernels.swiglu(*mx.split(stacked_N2F, 2, axis=-1)), x_ND)
            if trace is not None:
                trace.append(x_ND)
        return x_ND

    def final_norm(self, x: mx.array) -> mx.array:
        """The final RMSNorm of ``[..., D]``."""
        return self._norm(x, self.params.norm)

    def logits(self, x: mx.array) -> mx.array:
        """``[..., D]`` from `__call__` to logits ``[..., V]`` in the compute dtype."""
        return self.params.head(self.final_norm(x))

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, self.spec.rms_norm_eps)
