"""Rotary frequencies of a spec: one computation in float64 that every backend takes its table from.

Formulas: plain RoPE (arXiv 2104.09864) and YaRN (arXiv 2309.00071) exactly as transformers'
``_compute_yarn_parameters``; the attention factor multiplies both cos and sin.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import TYPE_CHECKING

from qwen2kit.spec.model import LinearScaling, ModelSpec, YarnScaling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RoPETable:
    """Inverse frequencies in radians per position, and the factor applied to cos and sin.

    Attributes:
        inv_freq: ``head_dim / 2`` values, highest frequency first.
        attention_factor: 1.0 without YaRN.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float

    def cos_sin(
        self, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cosines and sines ``[len(positions), head_dim / 2]`` in float64, factor included."""
        import numpy as np

        angles = np.outer(positions.astype(np.float64), np.asarray(self.inv_freq))
        return np.cos(angles) * self.attention_factor, np.sin(angles) * self.attention_factor

    def cos_less_one(self, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """``cos - 1`` ``[len(positions), head_dim / 2]`` in float64, times the factor; exact where
        the cosine is close to 1."""
        import numpy as np

        halves = np.outer(positions.astype(np.float64) / 2, np.asarray(self.inv_freq))
        return -2 * np.sin(halves) ** 2 * self.attention_factor


def rope_table(spec: ModelSpec) -> RoPETable:
    """The rotary table that ``spec`` calls for."""
    dim, theta = spec.head_dim, spec.rope.rope_theta
    plain = tuple(theta ** (-2.0 * m / dim) for m in range(dim // 2))
    scaling = spec.rope.scaling
    if scaling is None:
        return RoPETable(plain, 1.0)
    if isinstance(scaling, LinearScaling):
        return RoPETable(tuple(w / scaling.factor for w in plain), 1.0)
    return RoPETable(_yarn_frequencies(plain, scaling, dim, theta), _yarn_attention(scaling))


def _yarn_frequencies(
    plain: tuple[float, ...], yarn: YarnScaling, dim: int, theta: float
) -> tuple[float, ...]:
    def correction(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * log(length / (rotations * 2 * pi)) / (2 * log(theta))

    low, high = correction(yarn.beta_fast), correction(yarn.beta_slow)
    if yarn.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((m - low) / (high - low), 0.0), 1.0) for m in range(dim // 2)]
    return tuple(w * ((1 - r) + r / yarn.factor) for w, r in zip(plain, ramp, strict=True))


def _yarn_attention(yarn: YarnScaling) -> float:
    def scale(factor: float, mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return scale(yarn.factor, yarn.mscale) / scale(yarn.factor, yarn.mscale_all_dim)
    return scale(yarn.factor)
