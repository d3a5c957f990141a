"""Which cached positions the queries of one forward pass may see, per kind of layer.

Shape suffixes: B rows, T query positions, S cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen2kit_mlx.kernels import Mask
from qwen2kit_mlx.rotary import Start


@dataclass(frozen=True, slots=True)
class View:
    """Slots from ``first`` on, under ``mask`` (see `Kernels.attention`)."""

    first: int
    mask: Mask


def view(start: Start, count: int, window: int | None) -> View:
    """What ``count`` queries per row see, themselves included.

    Args:
        start: position of the first query: one number, or one per row (then ``count`` is 1).
        count: queries per row.
        window: sliding-window length in tokens, or None for full attention.
    """
    if not isinstance(start, int):
        return View(0, _ragged(start, window))
    end = start + count
    if window is None or end <= window:
        return View(0, None if count == 1 else "causal")
    first = max(0, start - window + 1)
    if count == 1:
        return View(first, None)
    distance_TS = np.arange(start, end)[:, None] - np.arange(first, end)[None, :]
    return View(first, mx.array((distance_TS >= 0) & (distance_TS < window))[None, None])


def _ragged(start: list[int], window: int | None) -> mx.array:
    own_B1 = np.asarray(start)[:, None]
    slots_1S = np.arange(max(start) + 1)[None, :]
    visible_BS = slots_1S <= own_B1
    if window is not None:
        visible_BS &= slots_1S > own_B1 - window
    return mx.array(visible_BS)[:, None, None, :]
