"""Weights as decoding reads them: matrices that share an input lie in one tensor.

The module's parameters become views of the joined tensors, so that nothing is held twice and
scoring, export and prefill go on as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen2kit_torch.linear import Linear
from qwen2kit_torch.model import DecoderLayer, Qwen2
from qwen2kit_torch.quantized import Quantized, QuantizedLinear
from qwen2kit_torch.triton_support import has_triton

Matrix = Tensor | Quantized
_KNOWN = (Linear, QuantizedLinear)
_OLDEST = (8, 0)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. D hidden, F ffn, W width of all q, k and v heads together.

    Attributes:
        norm: ``[D]``, before attention.
        heads, heads_bias: q, k and v ``[W, D]`` and ``[W]``.
        anchor: the keys' bias ``[K * C]`` where keys stand less their unrotated bias
            (`qwen2kit_torch.rope.drifted`), and zeros stand for it in ``heads_bias``; else None.
        out: ``[D, H * C]``.
        mlp_norm: ``[D]``.
        gate_up: ``[2F, D]``, gates first.
        down: ``[D, F]``.
        window: sliding-window length, or None.
    """

    norm: Tensor
    heads: Matrix
    heads_bias: Tensor
    anchor: Tensor | None
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
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

    That takes CUDA (Ampere or later, whose shared memory holds the tiles of attention) and Triton
    (with a C compiler), plain matrices that will not change (those that share an input in one
    form), and heads of a power of two.
    """
    size = model.spec.head_dim
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _OLDEST
        and has_triton()
        and size >= 16
        and size & (size - 1) == 0
        and not any(parameter.requires_grad for parameter in model.parameters())
        and all(type(m) in _KNOWN for m in model.modules() if isinstance(m, nn.Linear))
        and all(_alike(joint) for layer in model.model.layers for joint in _joints(layer))
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


def _joints(layer: nn.Module) -> tuple[tuple[Linear, ...], ...]:
    """Layers whose matrices share an input."""
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
    )


def _alike(linears: Sequence[Linear]) -> bool:
    """Whether all are dense, or all are in equal bits and groups."""
    forms = {(m.bits, m.group) if isinstance(m, QuantizedLinear) else None for m in linears}
    return len(forms) == 1


def _join_layer(layer: nn.Module) -> LayerWeights:
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    heads, gate_up = _joints(layer)
    bias = _joined([linear.bias for linear in heads if linear.bias is not None])
    anchor = attention.k_proj.bias.detach() if attention.anchored else None
    if anchor is not None:
        start = attention.q_proj.out_features
        bias = bias.clone()
        bias[start : start + len(anchor)] = 0
    return LayerWeights(
        norm=layer.input_layernorm.weight.detach(),
        heads=_joined_matrix(heads),
        heads_bias=bias,
        anchor=anchor,
        out=_joined_matrix([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined_matrix(gate_up),
        down=_joined_matrix([mlp.down_proj]),
        window=attention.window,
    )


def _joined_matrix(linears: Sequence[Linear]) -> Matrix:
    first = linears[0]
    if not isinstance(first, QuantizedLinear):
        return _joined([linear.weight for linear in linears])
    packed = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    assert len(packed) == len(linears)
    return Quantized(
        _joined([linear.weight for linear in packed]),
        _joined([linear.steps for linear in packed]),
        first.bits,
        first.group,
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` end to end; each becomes a view of the result."""
    if len(parts) == 1:
        return parts[0].detach()
    joint = torch.cat([part.detach() for part in parts])
    views = torch.split(joint, [len(part) for part in parts])
    for part, view in zip(parts, views, strict=True):
        part.data = view
    return joint
