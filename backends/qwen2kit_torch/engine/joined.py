"""Weights as decoding reads them: matrices that share an input lie in one tensor.

The module's parameters become views of the joined tensors, so that nothing is held twice and
scoring, export and prefill go on as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from qwen2kit_torch.linear import Linear
from qwen2kit_torch.model import DecoderLayer, Qwen2


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. D hidden, F ffn, W width of all q, k and v heads together.

    Attributes:
        norm: ``[D]``, before attention.
        heads, heads_bias: q, k and v ``[W, D]`` and ``[W]``.
        out: ``[D, H * C]``.
        mlp_norm: ``[D]``.
        gate_up: ``[2F, D]``, gates first.
        down: ``[D, F]``.
        window: sliding-window length, or None.
    """

    norm: Tensor
    heads: Tensor
    heads_bias: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    window: int | None


@dataclass(frozen=True, slots=True)
class JoinedWeights:
    """All weights of a model: embedding ``[V, D]``, layers, final norm, head ``[V, D]``."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


def can_capture(model: Qwen2, device: torch.device) -> bool:
    """Whether decoding steps of a loaded model can be captured on ``device``.

    That takes CUDA and Triton, dense matrices that will not change, and heads of a power of two.
    """
    size = model.spec.head_dim
    return (
        device.type == "cuda"
        and find_spec("triton") is not None
        and size >= 16
        and size & (size - 1) == 0
        and not any(parameter.requires_grad for parameter in model.parameters())
        and all(type(m) is Linear for m in model.modules() if isinstance(m, nn.Linear))
    )


def join(model: Qwen2) -> JoinedWeights:
    """Join the weights of a loaded model, one layer at a time."""
    embedding = model.model.embed_tokens.weight.detach()
    tied = model.spec.tie_word_embeddings
    return JoinedWeights(
        embedding=embedding,
        layers=tuple(_join_layer(layer) for layer in model.model.layers),
        norm=model.model.norm.weight.detach(),
        head=embedding if tied else model.lm_head.weight.detach(),
    )


def _join_layer(layer: nn.Module) -> LayerWeights:
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerWeights(
        norm=layer.input_layernorm.weight.detach(),
        heads=_joined([linear.weight for linear in heads]),
        heads_bias=_joined([linear.bias for linear in heads if linear.bias is not None]),
        out=attention.o_proj.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.detach(),
        window=attention.window,
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` end to end; each becomes a view of the result."""
    joint = torch.cat([part.detach() for part in parts])
    views = torch.split(joint, [len(part) for part in parts])
    for part, view in zip(parts, views, strict=True):
        part.data = view
    return joint
