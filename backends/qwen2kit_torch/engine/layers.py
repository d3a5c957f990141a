"""The decoder's layers over R rows at once: the vendor's matrix products, Triton between them.

Shapes: R rows, D hidden, H query heads, K kv heads, C head_dim, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.joined import JoinedWeights, LayerWeights
from qwen2kit_torch.engine.kernels import rows as kernels
from qwen2kit_torch.engine.packed_products import product, scratch_for
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import power_of_two
from qwen2kit_torch.quantized import Quantized
from qwen2kit_torch.rope import Rope

# Attention of layer ``n`` from rotated queries ``[R, H * C]`` into an equally shaped tensor.
Attend = Callable[[int, Tensor, Tensor], None]


class Buffers:
    """What the layers leave for each other, for ``count`` rows.

    Attributes:
        x, normed, added: ``[R, D]``.
        joint: ``[R, (H + 2K) * C]``.
        queries, mixed: ``[R, H * C]``.
        wide, gated: ``[R, 2F]`` and ``[R, F]``.
    """

    def __init__(self, spec: ModelSpec, weights: JoinedWeights, count: int) -> None:
        norm = weights.norm

        def values(width: int) -> Tensor:
            return torch.empty(count, width, dtype=norm.dtype, device=norm.device)

        self.x, self.normed, self.added = (values(spec.hidden_size) for _ in range(3))
        self.joint = values(weights.layers[0].heads.shape[0])
        width = spec.num_attention_heads * spec.head_dim
        self.queries, self.mixed = values(width), values(width)
        self.wide = values(2 * spec.intermediate_size)
        self.gated = values(spec.intermediate_size)

    @staticmethod
    def row_bytes(spec: ModelSpec, weights: JoinedWeights) -> int:
        """Bytes that a row takes."""
        width = spec.num_attention_heads * spec.head_dim
        numbers = 3 * spec.hidden_size + weights.layers[0].heads.shape[0] + 2 * width
        return (numbers + 3 * spec.intermediate_size) * weights.norm.dtype.itemsize


class Layers:
    """What the layers do with ``count`` rows.

    Args:
        spec, weights, storage: the model and its slots.
        count: R.
        rope: of the model, ``[>= capacity, C]`` each, in the compute dtype.
        buffers: of R rows at least, which others may use when this does not run; its own if None.

    Attributes:
        rows: int32 ``[3, R]``: token ids, slots (negative: none) and positions.
        x: the residual stream ``[R, D]``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        count: int,
        rope: Rope,
        buffers: Buffers | None = None,
    ) -> None:
        self._spec, self._weights, self._storage, self._rope = spec, weights, storage, rope
        self._r = count
        device, dtype = weights.norm.device, weights.norm.dtype
        self.rows = torch.zeros(3, count, dtype=torch.int32, device=device)
        given = buffers or Buffers(spec, weights, count)
        self.x, self._normed, self._added = (
            part[:count] for part in (given.x, given.normed, given.added)
        )
        self._joint, self._queries = given.joint[:count], given.queries[:count]
        self._mixed, self._wide, self._gated = (
            part[:count] for part in (given.mixed, given.wide, given.gated)
        )
        self._scratch = scratch_for(packed(weights), count, dtype.itemsize)

    def run_layers(self, attend: Attend) -> None:
        """All layers; the last one's addition to the residual stream is left to `final_norm`."""
        for index, layer in enumerate(self._weights.layers):
            self._layer(index, layer, attend)

    def final_norm(self, wanted: Tensor | None = None) -> Tensor:
        """The final norm's output ``[N, D]`` for the rows ``wanted`` (all by default)."""
        if wanted is None:
            self._norm(self.x, self._added, self._weights.norm, self._normed)
            return self._normed
        x = self.x[wanted]
        normed = torch.empty_like(x)
        if len(x):
            self._norm(x, self._added[wanted], self._weights.norm, normed)
        return normed

    def _layer(self, index: int, layer: LayerWeights, attend: Attend) -> None:
        spec = self._spec
        self._norm(self.x, self._added if index else None, layer.norm, self._normed)
        product(self._normed, layer.heads, self._joint, layer.heads_bias, self._scratch)
        keys, values = self._storage.layers[index]
        heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
        kernels.rotate_and_store[(self._r, heads)](
            self._joint, *self._turning(layer), self.rows[1], self.rows[2], self._queries, keys,
            values, self._storage.capacity, spec.num_attention_heads, spec.num_key_value_heads,
            spec.head_dim, layer.anchor is not None, num_warps=1,
        )  # fmt: skip
        attend(index, self._queries, self._mixed)
        product(self._mixed, layer.out, self._added, scratch=self._scratch)
        self._norm(self.x, self._added, layer.mlp_norm, self._normed)
        product(self._normed, layer.gate_up, self._wide, scratch=self._scratch)
        ffn = spec.intermediate_size
        kernels.silu_times[(self._r, triton.cdiv(ffn, 1024))](self._wide, self._gated, ffn, 1024)
        product(self._gated, layer.down, self._added, scratch=self._scratch)

    def _turning(self, layer: LayerWeights) -> tuple[Tensor, ...]:
        """Cosines, sines, cosines less one and anchor; the last two, where there are none, are
        others that are not read."""
        cos, sin = self._rope[:2]
        if layer.anchor is None:
            return cos, sin, cos, layer.heads_bias
        return cos, sin, self._rope[2], layer.anchor

    def _norm(self, x: Tensor, added: Tensor | None, weight: Tensor, normed: Tensor) -> None:
        """``x += added``, then ``normed`` is its norm."""
        hidden = self._spec.hidden_size
        kernels.add_and_norm[(len(x),)](
            x, x if added is None else added, weight, normed, self._spec.rms_norm_eps,
            added is not None, hidden, power_of_two(hidden), num_warps=8 if hidden > 1024 else 4,
        )  # fmt: skip

    def embed(self, count: Tensor) -> None:
        """Rows of the embedding into the residual stream; ``count`` (int32 ``[1]``) grows by 1."""
        hidden = self._spec.hidden_size
        kernels.embed[(self._r,)](
            self.rows[0], self._weights.embedding, self.x, count, hidden, power_of_two(hidden)
        )


def packed(weights: JoinedWeights) -> list[Quantized]:
    """The matrices that are held in codes."""
    return [
        matrix
        for layer in weights.layers
        for matrix in (layer.heads, layer.out, layer.gate_up, layer.down)
        if isinstance(matrix, Quantized)
    ]
