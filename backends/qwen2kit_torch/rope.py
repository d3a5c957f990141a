"""Cosines and sines of the rotary embedding on a device, and their application.

The table itself (plain, linear, YaRN) is computed in float64 by `qwen2kit.spec.rope`.
Shapes: B batch, T tokens, N heads, C head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.rope import rope_table

_BLOCK = 1024


class Rotary:
    """Tables that grow with the longest position asked for; one copy per device and dtype."""

    def __init__(self, spec: ModelSpec) -> None:
        self._table = rope_table(spec)
        self._cached: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

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

    def _build(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self._table.cos_sin(np.arange(length))
        halves = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        with torch.inference_mode(False):
            first, second = (
                torch.from_numpy(x.astype(np.float32)).to(device, dtype) for x in halves
            )
        return first, second


def rotate(x_BTNC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads ``[B, T, N, C]`` by tables that broadcast to ``[B, T, 1, C]``."""
    swapped = x_BTNC.roll(x_BTNC.shape[-1] // 2, -1)
    return x_BTNC * cos + swapped * sin
