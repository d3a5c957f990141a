"""The executable definition of the model: a NumPy float64 forward pass, nothing optimised.

It is the arbiter when two backends disagree, and covers everything a spec can say except dual
chunk attention. Shapes: B is absent (one sequence), T tokens, D hidden, H heads, K kv heads,
C head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec, MoESpec
from qwen2kit.spec.rope import rope_table
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, LM_HEAD
from qwen2kit.weights.source import WeightSource

Array = NDArray[np.float64]


class ReferenceModel:
    """Reads weights tensor by tensor and computes in float64.

    Args:
        spec: the model.
        weights: canonical tensors.

    Raises:
        BackendError: the spec uses dual chunk attention.
    """

    def __init__(self, spec: ModelSpec, weights: WeightSource) -> None:
        if spec.dual_chunk is not None:
            raise BackendError("the reference model does not define dual chunk attention")
        self.spec = spec
        self._weights = weights

    def logits(self, tokens: Sequence[int]) -> Array:
        """Logits ``[T, V]``."""
        head = EMBED_TOKENS if self.spec.tie_word_embeddings else LM_HEAD
        return np.asarray(self.hidden_states(tokens)[-1] @ self._w(head).T)

    def hidden_states(self, tokens: Sequence[int]) -> Array:
        """``[layers + 2, T, D]``: embedding, each layer's output, final norm's output."""
        spec = self.spec
        x_TD = self._w(EMBED_TOKENS)[np.asarray(tokens)]
        states = [x_TD]
        cos, sin = rope_table(spec).cos_sin(np.arange(len(tokens)))
        for layer in range(spec.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(x_TD, prefix + "input_layernorm.weight")
            x_TD = x_TD + self._attention(normed, prefix + "self_attn.", layer, cos, sin)
            normed = self._norm(x_TD, prefix + "post_attention_layernorm.weight")
            x_TD = x_TD + self._mlp(normed, prefix + "mlp.", layer)
            states.append(x_TD)
        states.append(self._norm(x_TD, FINAL_NORM))
        return np.stack(states)

    def _w(self, name: str) -> Array:
        return self._weights.read(name).float32().astype(np.float64)

    def _norm(self, x: Array, name: str) -> Array:
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(self._w(name) * x / np.sqrt(variance + self.spec.rms_norm_eps))

    def _attention(self, x: Array, prefix: str, layer: int, cos: Array, sin: Array) -> Array:
        spec, length = self.spec, len(x)

        def heads(name: str, count: int) -> Array:
            y = x @ self._w(f"{prefix}{name}_proj.weight").T + self._w(f"{prefix}{name}_proj.bias")
            return y.reshape(length, count, spec.head_dim)

        q_THC = _rotate(heads("q", spec.num_attention_heads), cos, sin)
        k_TKC = _rotate(heads("k", spec.num_key_value_heads), cos, sin)
        v_TKC = heads("v", spec.num_key_value_heads)
        k_THC = np.repeat(k_TKC, spec.num_key_value_groups, axis=1)
        v_THC = np.repeat(v_TKC, spec.num_key_value_groups, axis=1)
        scores_HTS = np.einsum("thc,shc->hts", q_THC, k_THC) / np.sqrt(spec.head_dim)
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        window = spec.window_of(layer)
        visible = (distance >= 0) & (distance < (window or length + 1))
        probs_HTS = _softmax(np.where(visible, scores_HTS, -np.inf))
        out = np.einsum("hts,shc->thc", probs_HTS, v_THC).reshape(length, -1)
        return np.asarray(out @ self._w(prefix + "o_proj.weight").T)

    def _mlp(self, x: Array, prefix: str, layer: int) -> Array:
        moe = self.spec.moe
        if moe is None or not moe.is_sparse(layer):
            return self._gated(x, prefix)
        return self._sparse(x, prefix, moe)

    def _gated(self, x: Array, prefix: str) -> Array:
        gate = x @ self._w(prefix + "gate_proj.weight").T
        up = x @ self._w(prefix + "up_proj.weight").T
        return np.asarray((gate * _sigmoid(gate) * up) @ self._w(prefix + "down_proj.weight").T)

    def _sparse(self, x: Array, prefix: str, moe: MoESpec) -> Array:
        probs_TE = _softmax(x @ self._w(prefix + "gate.weight").T)
        top = np.argsort(-probs_TE, axis=-1, kind="stable")[:, : moe.num_experts_per_tok]
        gates = np.take_along_axis(probs_TE, top, axis=-1)
        if moe.norm_topk_prob:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        shared_gate = _sigmoid(x @ self._w(prefix + "shared_expert_gate.weight").T)
        out = shared_gate * self._gated(x, prefix + "shared_expert.")
        for expert in np.unique(top):
            rows, slots = np.nonzero(top == expert)
            expert_out = self._gated(x[rows], f"{prefix}experts.{expert}.")
            out[rows] += gates[rows, slots, None] * expert_out
        return out


def _rotate(x_THC: Array, cos: Array, sin: Array) -> Array:
    half = x_THC.shape[-1] // 2
    first, second = x_THC[..., :half], x_THC[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))
