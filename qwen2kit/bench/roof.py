"""The least time a pass can take: bytes to move over bandwidth, products over matrix rate.

Roofline model (Williams et al., CACM 52(4), 2009) with both limits measured on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qwen2kit.spec.counts import kv_bytes_per_token
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import ITEM_SIZE, DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Limits of one device and model.

    Attributes:
        bandwidth: bytes per second.
        matmul: FLOP per second.
        weights: bytes of the weights a decoding step reads (`decode_weight_bytes`).
        cache: bytes of the keys and values of one token.
        spec: the model.
    """

    bandwidth: float
    matmul: float
    weights: int
    cache: int
    spec: ModelSpec

    def prefill(self, tokens: int) -> float:
        """Seconds to read a prompt of so many tokens: its products."""
        return prefill_flops(self.spec, tokens) / self.matmul

    def decode(self, context: float, streams: int = 1) -> float:
        """Seconds for the next token of ``streams`` sequences of ``context`` tokens each:
        weights once and every cache, or the products if they take longer."""
        moved = self.weights + streams * context * self.cache
        products = streams * decode_flops(self.spec, context)
        return max(moved / self.bandwidth, products / self.matmul)


class Held(NamedTuple):
    """How a compiled model holds what it reads.

    Attributes:
        dtype: compute dtype, of everything that is not quantised.
        packed: bits of checkpoints whose matrices stay as they are stored.
        weight_bits, group: of the layers' matrices if they were quantised while loading.
        cache_bits: of keys and values if they are.
    """

    dtype: DType
    packed: tuple[int, ...] = ()
    weight_bits: int | None = None
    group: int = 64
    cache_bits: int | None = None


def roof_of(
    spec: ModelSpec, weights: WeightSource, held: Held, *, bandwidth: float, matmul: float
) -> Roof:
    """The roof of a model that was loaded from ``weights``; the scales of a quantised cache are
    left out of it."""
    width = 8 * ITEM_SIZE[held.dtype] if held.cache_bits is None else held.cache_bits
    return Roof(
        bandwidth=bandwidth,
        matmul=matmul,
        weights=decode_weight_bytes(spec, weights, held),
        cache=kv_bytes_per_token(spec, width) // 8,
        spec=spec,
    )


def decode_weight_bytes(spec: ModelSpec, weights: WeightSource, held: Held) -> int:
    """Bytes of every parameter but an embedding that is not also the head (one row of it is)."""
    item = ITEM_SIZE[held.dtype]
    total = 0
    for param in schema(spec):
        if param.kind == "embedding" and not spec.tie_word_embeddings:
            continue
        stored = weights.affine(param.name) if param.quantizable else None
        if stored is not None and stored.bits in held.packed:
            total += stored.packed.nbytes + stored.scales.nbytes + stored.biases.nbytes
        elif param.kind == "linear" and held.weight_bits is not None:
            total += param.size * held.weight_bits // 8 + 2 * item * param.size // held.group
        else:
            total += param.size * item
    return total


def prefill_flops(spec: ModelSpec, tokens: int) -> int:
    """FLOP of reading a prompt: products and causal attention, the head at its last token."""
    width = spec.num_attention_heads * spec.head_dim
    attention = 2 * spec.num_hidden_layers * width * tokens * tokens
    head = 2 * spec.vocab_size * spec.hidden_size
    return 2 * _matrices(spec) * tokens + attention + head


def decode_flops(spec: ModelSpec, context: float) -> float:
    """FLOP of one token after ``context`` others."""
    matrices = _matrices(spec) + spec.vocab_size * spec.hidden_size
    width = spec.num_attention_heads * spec.head_dim
    return 2 * matrices + 4 * spec.num_hidden_layers * width * context


def _matrices(spec: ModelSpec) -> int:
    """Elements of the matrices of all layers that one token is multiplied with."""
    experts = spec.moe.num_experts_per_tok if spec.moe else 0
    return sum(
        param.size
        for param in schema(spec)
        if param.kind in ("linear", "router") and (param.expert is None or param.expert < experts)
    )
