"""Which cached positions the queries of one forward pass may see, per kind of layer.

Shape suffixes: B rows, T query positions, S cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen2kit_mlx.kernels import Mask


@dataclass(frozen=True, slots=True)
class View:
    """Columns from ``first`` on, under ``mask`` (see `Kernels.attention`; booleans until
    `Kernels.mask` has seen them)."""

    first: int
    mask: Mask


def view(start: int, count: int, window: int | None) -> View:
    """What ``count`` queries per row see, themselves included.

    Args:
        start: position of the first query in every row.
        count: queries per row.
        window: sliding-window length in tokens, or None for full attention.
    """
    end = start + count
    if window is None or end <= window:
        return View(0, None if count == 1 else "causal")
    first = max(0, start - window + 1)
    if count == 1:
        return View(first, None)
    distance_TS = np.arange(start, end)[:, None] - np.arange(first, end)[None, :]
    return View(first, mx.array((distance_TS >= 0) & (distance_TS < window))[None, None])


def ragged(positions_BT: mx.array, end: int, window: int | None) -> mx.array:
    """Booleans ``[B, 1, T, end]``: what queries at positions that differ by row see."""
    own_BT1, columns_S = positions_BT[:, :, None], mx.arange(end)
    visible_BTS = columns_S <= own_BT1
    if window is not None:
        visible_BTS = visible_BTS & (columns_S > own_BT1 - window)
    return visible_BTS[:, None]
