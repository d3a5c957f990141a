"""Which dimension of a parameter tensor parallelism divides, from its logical axes alone.

Megatron's layout (arXiv 1909.08053): projections into heads and FFN channels are divided by
output, projections out of them by input, embedding and head by vocabulary; everything else is
whole on every process of the ``tp`` axis. FSDP then divides dimension 0 of whatever is left.
"""

from __future__ import annotations

from typing import Final

from qwen2kit.spec.axes import Axis
from qwen2kit.spec.schema import Param

DIVIDED: Final = frozenset({Axis.HEADS, Axis.KV_HEADS, Axis.FFN, Axis.SHARED_FFN, Axis.VOCAB})


def tensor_dim(param: Param) -> int | None:
    """The dimension of ``param`` that is divided over ``tp``, or None if it is replicated."""
    for index, dim in enumerate(param.dims):
        if dim[0] in DIVIDED:
            return index
    return None


def local_shape(param: Param, tp: int) -> tuple[int, ...]:
    """Shape of one process's part of ``param`` with ``tp`` processes (exact division assumed)."""
    divided = tensor_dim(param)
    return tuple(size // tp if i == divided else size for i, size in enumerate(param.shape))
