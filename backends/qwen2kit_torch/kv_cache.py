"""Keys and values of all layers, preallocated, where a token's slot is its position.

What lies beyond the valid slots is overwritten before it can be seen. Slots start as zeros, because
a masked NaN would still spread (0 * NaN). Shapes: B rows, K kv heads, S slots, C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qwen2kit.spec.model import ModelSpec

_BLOCK = 256


class Cache(Protocol):
    """What a forward pass asks of the cache it appends to.

    Attributes:
        length: tokens already held, in every row.
    """

    length: int

    def reserve(self, new: int) -> None:
        """Make room for ``new`` more tokens in every row, before the layers append them."""
        ...

    def append(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns those that attention is to read."""
        ...

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as present in every row, after all layers have appended them."""
        ...


class KVCache:
    """A cache of one row, whose slots can be picked.

    Args:
        spec: the model.
        device: where it lives.
        dtype: compute dtype of the model.
        capacity: slots to allocate at once; more are added in blocks when needed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int = _BLOCK,
    ) -> None:
        self.length = 0
        self._shape = (1, spec.num_key_value_heads, _round_up(capacity), spec.head_dim)
        self._layers = [
            (torch.zeros(self._shape, device=device, dtype=dtype),
             torch.zeros(self._shape, device=device, dtype=dtype))
            for _ in range(spec.num_hidden_layers)
        ]  # fmt: skip

    @property
    def capacity(self) -> int:
        """Slots allocated per row."""
        return self._shape[2]

    def reserve(self, new: int) -> None:
        """Make room for ``new`` more tokens in every row, before the layers append them."""
        needed = self.length + new
        if needed > self.capacity:
            self._reallocate(_round_up(max(needed, self.capacity + self.capacity // 2)))

    def append(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all, ``[1, K, S, C]``."""
        keys, values = self._layers[layer]
        new = k_BKTC.shape[2]
        start = self.length
        keys[:, :, start : start + new] = k_BKTC
        values[:, :, start : start + new] = v_BKTC
        return keys[:, :, : start + new], values[:, :, : start + new]

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as present in every row, after all layers have appended them."""
        self.length += new

    def keep_slots(self, slots: Sequence[int]) -> None:
        """Drop all slots but ``slots``, which keep the given order."""
        count = len(slots)
        assert count <= self.length
        if any(slot != index for index, slot in enumerate(slots)):
            index = torch.tensor(slots, device=self._layers[0][0].device)
            for pair in self._layers:
                for part in pair:
                    part[:, :, :count] = part[:, :, index]
        self.length = count

    def _reallocate(self, capacity: int) -> None:
        used = self.length
        self._shape = (*self._shape[:2], capacity, self._shape[3])
        for layer, pair in enumerate(self._layers):
            grown = tuple(old.new_zeros(self._shape) for old in pair)
            for new, old in zip(grown, pair, strict=True):
                new[:, :, :used] = old[:, :, :used]
            self._layers[layer] = (grown[0], grown[1])


def _round_up(slots: int) -> int:
    return max(1, -(-slots // _BLOCK)) * _BLOCK
