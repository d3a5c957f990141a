"""Qwen2 as a plain, differentiable, single-device ``nn.Module``; its state dict has HF names.

It imports no ``torch.distributed``: parallelism is applied from outside. Shapes: B batch,
T tokens, D hidden, H query heads, K kv heads, C head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.attention import Attend, visibilities
from qwen2kit_torch.fused.norm import added_and_normed, normed
from qwen2kit_torch.fused.products import linear_onto
from qwen2kit_torch.fused.rotation import rotated_heads
from qwen2kit_torch.fused.swiglu import swiglu
from qwen2kit_torch.kv_cache import Cache
from qwen2kit_torch.linear import Linear, joint, linear, pack, packed_linear
from qwen2kit_torch.rope import Rope, Rotary, drifted, rotate


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the weight multiplies after the cast back, as in HF."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with biased q/k/v projections and rotary positions.

    Attributes:
        fused: compute the three projections as one product, and rotate it in one pass.
        anchored: without gradients keys stand less their unrotated bias, see
            `qwen2kit_torch.rope.drifted`.
    """

    def __init__(
        self, spec: ModelSpec, layer: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.fused = self.anchored = False
        self.layer = layer
        self.window = spec.window_of(layer)
        self.head_dim = spec.head_dim
        self.heads, self.kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        width = spec.num_attention_heads * spec.head_dim
        kv_width = spec.num_key_value_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, width, device=device, dtype=dtype, bias=True)
        self.k_proj = Linear(spec.hidden_size, kv_width, device=device, dtype=dtype, bias=True)
        self.v_proj = Linear(spec.hidden_size, kv_width, device=device, dtype=dtype, bias=True)
        self.o_proj = Linear(width, spec.hidden_size, device=device, dtype=dtype)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        visible: Mapping[int | None, Attend],
        cache: Cache | None,
    ) -> Tensor:
        """``[B, T, D] -> [B, T, D]``."""
        q, k, v = (x_BTNC.transpose(1, 2) for x_BTNC in self._heads(x_BTD, rope))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out_BHTC = visible[self.window](q, k, v)
        out: Tensor = self.o_proj(out_BHTC.transpose(1, 2).reshape(*x_BTD.shape[:2], -1))
        return out

    def _heads(self, x_BTD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: ``[B, T, heads, C]``."""
        cos, sin = rope[:2]
        if self.fused:
            product = joint(x_BTD, self.q_proj, self.k_proj, self.v_proj)
            return rotated_heads(product, cos, sin, self.heads, self.kv_heads)
        q, v = self._split(self.q_proj(x_BTD)), self._split(self.v_proj(x_BTD))
        if not self.anchored or torch.is_grad_enabled():
            return rotate(q, cos, sin), rotate(self._split(self.k_proj(x_BTD)), cos, sin), v
        k = rotate(self._split(self.k_proj.product(x_BTD, None)), cos, sin)
        return rotate(q, cos, sin), drifted(k, self._split(self.k_proj.bias), sin, rope[2]), v

    def _split(self, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (-1, self.head_dim))  # type: ignore[no-untyped-call]
        return parts


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202).

    Attributes:
        fused: compute gate and up as one product, and its activation in one pass.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.fused = False
        self.gate_proj = Linear(
            spec.hidden_size, spec.intermediate_size, device=device, dtype=dtype
        )
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, device=device, dtype=dtype)
        self.down_proj = Linear(
            spec.intermediate_size, spec.hidden_size, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """``[..., D] -> [..., D]``, added to ``onto`` if given."""
        if self.fused:
            inner = swiglu(joint(x, self.gate_proj, self.up_proj))
        else:
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        down = self.down_proj
        if onto is not None and type(down) is Linear and down.tuned:
            return linear_onto(inner, down.weight, None, onto)
        out: Tensor = down(inner)
        return out if onto is None else onto + out


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection.

    Attributes:
        fused: compute norms in one pass with the residual sums and gradients next to them.
    """

    def __init__(
        self, spec: ModelSpec, layer: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.fused = False
        self.self_attn = Attention(spec, layer, device, dtype)
        self.mlp = MLP(spec, device, dtype)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, device, dtype)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        visible: Mapping[int | None, Attend],
        cache: Cache | None,
    ) -> Tensor:
        """``[B, T, D] -> [B, T, D]``."""
        before, after = self.input_layernorm, self.post_attention_layernorm
        if self.fused:
            x_BTD, inner = normed(x_BTD, before.weight, before.eps)
            update = self.self_attn(inner, rope, visible, cache)
            x_BTD, inner = added_and_normed(x_BTD, update, after.weight, after.eps)
            out: Tensor = self.mlp(inner, x_BTD)
        else:
            x_BTD = x_BTD + self.self_attn(before(x_BTD), rope, visible, cache)
            out = x_BTD + self.mlp(after(x_BTD))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm: what HF calls ``model``."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(spec.vocab_size, spec.hidden_size, device=device, dtype=dtype)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, layer, device, dtype) for layer in range(spec.num_hidden_layers)
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, device, dtype)


class Qwen2(nn.Module):
    """The dense Qwen2 decoder with its language-model head.

    Parameters are left uninitialised. A tied head has no parameter of its own.

    Args:
        spec: the model.
        device: where parameters are created; ``meta`` builds the skeleton only.
        dtype: parameter dtype, float32 by default.

    Raises:
        BackendError: the spec has mixture-of-experts layers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if spec.moe is not None:
            raise BackendError(
                "the torch backend does not run mixture-of-experts models (qwen2_moe) yet; "
                "use a dense Qwen2 checkpoint"
            )
        device = torch.device(device)
        self.spec = spec
        self.model = Decoder(spec, device, dtype)
        if not spec.tie_word_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, device=device, dtype=dtype)
        self._packed_head: Tensor | None = None
        self._settled = self.anchored = False
        self.rotary = Rotary(spec)
        self.windows = [spec.window_of(layer) for layer in range(spec.num_hidden_layers)]

    def forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits ``[B, T, V]``; keyword arguments are those of `forward_hidden`."""
        return self.head(self.forward_hidden(tokens, **kwargs))

    def forward_hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        visible: Mapping[int | None, Attend] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, ``[B, T, D]``.

        Args:
            tokens: int ids ``[B, T]``.
            positions: rotary positions ``[B, T]``, each below T (they may restart, as in packed
                documents); by default each row counts on from the end of its cache, or from 0.
            documents: document numbers ``[B, T]`` which attention must not cross (padding may be
                one more document, e.g. -1). Not together with a cache.
            cache: holds earlier tokens; ``tokens`` are appended to it.
            visible: attention for every window length in use, where a causal mask over the
                cache and ``tokens`` is not what is wanted.

        Raises:
            BackendError: a dual-chunk model is asked for more than ``chunk_size + 1`` tokens, up
                to which dual chunk attention is the same as full attention.
        """
        trace = self.hidden_trace(
            tokens, positions=positions, documents=documents, cache=cache, visible=visible
        )
        return deque(trace, maxlen=1).pop()

    def hidden_trace(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        visible: Mapping[int | None, Attend] | None = None,
    ) -> Iterator[Tensor]:
        """The residual stream, one ``[B, T, D]`` at a time: embedding, every layer's output, final
        norm's output. Arguments and errors are those of `forward_hidden`."""
        assert cache is None or documents is None
        length = tokens.shape[1]
        start = 0 if cache is None else cache.length
        if visible is None:
            self._check_length(start + length)
        if cache is not None:
            cache.reserve(length)
        x_BTD = self.model.embed_tokens(tokens)
        rope = self._rope(positions, start, length, x_BTD)
        if visible is None:
            visible = visibilities(
                self.windows, start=start, length=length, documents=documents, device=tokens.device
            )
        yield x_BTD
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, rope, visible, cache)
            yield x_BTD
        if cache is not None:
            cache.advance(length)
        yield self.model.norm(x_BTD)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., D]``."""
        if self.spec.tie_word_embeddings:
            if self._packed_head is not None and not torch.is_grad_enabled():
                return packed_linear(hidden, self._packed_head)
            weight = self.model.embed_tokens.weight
            return F.linear(hidden, weight) if torch.is_grad_enabled() else linear(hidden, weight)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def pack(self) -> None:
        """Bring frozen weights into the layout that decodes fastest on their device, once.

        Afterwards they are read through `Linear.dense_weight`. Trainable weights stay as they are.
        """
        if self._settled:
            return
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.spec.tie_word_embeddings:
            self._packed_head = pack(self.model.embed_tokens.weight)
        self._settled = True

    def anchor_keys(self) -> None:
        """From now on keys stand less their unrotated bias, in caches too: more precise, and the
        same attention. For inference, with caches filled by this network alone."""
        self.anchored = True
        for module in self.modules():
            if isinstance(module, Attention):
                module.anchored = True

    def discard_packed(self) -> None:
        """Forget packed weights, before all plain ones are assigned anew."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.discard()
        self._packed_head = None
        self._settled = False

    def rope(self, length: int, device: torch.device, dtype: torch.dtype) -> Rope:
        """The rotary tables of at least ``length`` positions, ``[>= length, C]`` each."""
        tables: Rope = self.rotary.tables(length, device, dtype)
        return (*tables, self.rotary.less_one(length, device, dtype)) if self.anchored else tables

    def _rope(self, positions: Tensor | None, start: int, length: int, like: Tensor) -> Rope:
        total = start + length
        tables = self.rope(total, like.device, like.dtype)
        if positions is None:
            return tuple(table[start:total, None] for table in tables)
        return tuple(table[positions][:, :, None] for table in tables)

    def _check_length(self, length: int) -> None:
        dual = self.spec.dual_chunk
        if dual is not None and length > dual.chunk_size + 1:
            raise BackendError(
                f"{length} tokens need dual chunk attention, which the torch backend lacks beyond "
                f"chunk_size + 1 = {dual.chunk_size + 1} tokens; shorten the input"
            )
