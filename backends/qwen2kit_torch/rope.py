"""Cosines and sines of the rotary embedding on a device, and their application.

The table itself (plain, linear, YaRN) is computed in float64 by `qwen2kit.spec.rope`.
Shapes: B batch, T tokens, N heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.rope import rope_table

_BLOCK = 1024

Rope = tuple[Tensor, ...]
"""Cosines and sign-folded sines that broadcast to ``[B, T, 1, C]``; with anchored keys (`drifted`)
cosines less one after them."""


class Rotary:
    """Tables that grow with the longest position asked for; one copy per device and dtype."""

    def __init__(self, spec: ModelSpec) -> None:
        self._table = rope_table(spec)
        self._cached: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._less_one: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def tables(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sign-folded sine, each ``[>= length, C]``, rounded from float64 via float32.

        The second is ``(-sin, sin)`` over the two halves, so that a rotation is
        ``x * cos + swap_halves(x) * sin``.
        """
        cached = self._cached.get((device, dtype))
        if cached is None or len(cached[0]) < length:
            cached = self._build(-(-length // _BLOCK) * _BLOCK, device, dtype)
            self._cached[device, dtype] = cached
        return cached

    def less_one(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Cosines less one ``[>= length, C]``, rounded as the tables are, for `drifted`."""
        cached = self._less_one.get((device, dtype))
        if cached is None or len(cached) < length:
            half = self._table.cos_less_one(np.arange(-(-length // _BLOCK) * _BLOCK))
            (cached,) = _on(device, dtype, np.concatenate([half, half], -1))
            self._less_one[device, dtype] = cached
        return cached

    def _build(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self._table.cos_sin(np.arange(length))
        halves = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        first, second = _on(device, dtype, *halves)
        return first, second


def rotate(x_BTNC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads ``[B, T, N, C]`` by tables that broadcast to ``[B, T, 1, C]``."""
    swapped = x_BTNC.roll(x_BTNC.shape[-1] // 2, -1)
    return x_BTNC * cos + swapped * sin


def drifted(x_BTKC: Tensor, anchor_KC: Tensor, sin: Tensor, less_one: Tensor) -> Tensor:
    """``x`` plus what rotation adds to a vector that is the same at every position.

    Attention does not change when one vector is taken from all keys, since it moves all scores of a
    query alike. Qwen2's key biases reach 200 in dimensions that hardly turn; keys without their
    unrotated bias, ``drifted(rotate(product), bias)``, leave the digits to what differs among them.

    Args:
        x_BTKC: rotated keys without bias.
        anchor_KC: the vector, one per key head.
        sin, less_one: from `Rotary`, broadcasting to ``[B, T, 1, C]``.
    """
    swapped = anchor_KC.roll(anchor_KC.shape[-1] // 2, -1)
    return torch.addcmul(torch.addcmul(x_BTKC, anchor_KC, less_one), swapped, sin)


def _on(device: torch.device, dtype: torch.dtype, *tables: NDArray[np.float64]) -> Iterator[Tensor]:
    with torch.inference_mode(False):
        yield from [torch.from_numpy(x.astype(np.float32)).to(device, dtype) for x in tables]
