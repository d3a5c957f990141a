"""Where two implementations part: the residual stream compared layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2kit.errors import ParityError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Largest relative difference that rounding alone explains, per compute dtype.
NOISE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Layer-by-layer difference of two residual streams.

    Attributes:
        relative: per state (embedding, every layer, final norm), the largest absolute difference
            divided by the largest absolute value.
        first: index of the first state beyond the noise of the dtype, or None.
    """

    relative: tuple[float, ...]
    first: int | None

    @property
    def where(self) -> str:
        """The first diverging state in words."""
        if self.first is None:
            return "no layer differs by more than rounding"
        return state_name(self.first, len(self.relative))


def state_name(index: int, states: int) -> str:
    """Name of state ``index`` out of ``states`` (``layers + 2``)."""
    if index == 0:
        return "embedding"
    return "final norm" if index == states - 1 else f"layer {index - 1}"


def first_divergence(
    a: NDArray[np.float32], b: NDArray[np.float32], *, dtype: str = "float32"
) -> Divergence:
    """Compare residual streams ``[layers + 2, T, hidden]``.

    Raises:
        ParityError: their shapes differ.
    """
    import numpy as np

    if a.shape != b.shape:
        raise ParityError(f"hidden states of shapes {list(a.shape)} and {list(b.shape)}")
    relative = []
    for left, right in zip(a, b, strict=True):
        scale = max(float(np.abs(left).max()), float(np.abs(right).max()), 1e-30)
        worst = float(np.abs(left - right).max()) / scale
        relative.append(worst if worst == worst else float("inf"))
    beyond = [index for index, value in enumerate(relative) if value > NOISE[dtype]]
    return Divergence(relative=tuple(relative), first=beyond[0] if beyond else None)
