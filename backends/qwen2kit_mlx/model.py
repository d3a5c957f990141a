"""The Qwen2 decoder in MLX. It knows nothing of files, devices or sampling.

Shape suffixes: B batch, T tokens, D hidden, H query heads, K kv heads, C head size, F feed-forward
width (gate and up stacked: 2F), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.kv_cache import KVCache
from qwen2kit_mlx.linear import Matrix, Single
from qwen2kit_mlx.rotary import Rotary, Rotation
from qwen2kit_mlx.visibility import View, view


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
    """

    def __init__(
        self, spec: ModelSpec, params: ModelParams, kernels: Kernels, dtype: mx.Dtype
    ) -> None:
        self.spec, self.params, self.kernels, self.dtype = spec, params, kernels, dtype
        self._rotary = Rotary(spec, dtype)
        self._windows = [spec.window_of(layer) for layer in range(spec.num_hidden_layers)]

    def __call__(
        self, tokens_BT: mx.array, cache: KVCache | None, trace: list[mx.array] | None = None
    ) -> mx.array:
        """Residual stream ``[B, T, D]`` after the last layer, before the final norm.

        Args:
            tokens_BT: int32 ids; they follow each row's cached positions.
            cache: extended by T positions, or None to start at position 0 and keep nothing.
            trace: receives the embedding output and every layer's output.
        """
        start, count = cache.start if cache else 0, tokens_BT.shape[1]
        views = {window: view(start, count, window) for window in set(self._windows)}
        rotation = self._rotary.at(start, count)
        x_BTD = self.params.embed.embed(tokens_BT)
        if trace is not None:
            trace.append(x_BTD)
        for index, layer in enumerate(self.params.layers):
            x_BTD = x_BTD + self._attention(
                self._norm(x_BTD, layer.input_norm),
                layer, index, rotation, views[self._windows[index]], cache,
            )  # fmt: skip
            stacked_BT2F = layer.gate_up(self._norm(x_BTD, layer.post_norm))
            x_BTD = x_BTD + layer.down(self.kernels.swiglu(*mx.split(stacked_BT2F, 2, axis=-1)))
            if trace is not None:
                trace.append(x_BTD)
        if cache is not None:
            cache.advance(count)
        return x_BTD

    def final_norm(self, x: mx.array) -> mx.array:
        """The final RMSNorm of ``[..., D]``."""
        return self._norm(x, self.params.norm)

    def logits(self, x: mx.array) -> mx.array:
        """``[..., D]`` from `__call__` to logits ``[..., V]`` in the compute dtype."""
        return self.params.head(self.final_norm(x))

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, self.spec.rms_norm_eps)

    def _attention(
        self,
        x_BTD: mx.array,
        layer: LayerParams,
        index: int,
        rotation: Rotation,
        seen: View,
        cache: KVCache | None,
    ) -> mx.array:
        spec = self.spec
        rows, count, _ = x_BTD.shape
        heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        stacked = layer.qkv(x_BTD).reshape(rows, count, heads + 2 * kv_heads, spec.head_dim)
        stacked = stacked.transpose(0, 2, 1, 3)
        rotated = rotation(stacked[:, : heads + kv_heads])
        q_BHTC, k_BKTC = rotated[:, :heads], rotated[:, heads:]
        v_BKTC = stacked[:, heads + kv_heads :]
        if cache is not None:
            k_BKTC, v_BKTC = cache.write(index, k_BKTC, v_BKTC)
        if seen.first:
            k_BKTC, v_BKTC = k_BKTC[:, :, seen.first :], v_BKTC[:, :, seen.first :]
        out_BHTC = self.kernels.attention(
            q_BHTC, k_BKTC, v_BKTC, self._rotary.score_scale, seen.mask
        )
        return layer.o(out_BHTC.transpose(0, 2, 1, 3).reshape(rows, count, -1))
