"""Context parallelism: every process holds a part of each row and gathers keys and values.

A row is cut into ``2 * cp`` equal chunks; process ``r`` takes chunks ``r`` and ``2 cp - 1 - r``,
so that under a causal mask all have the same work. Keys and values are gathered rather than
passed round a ring (arXiv 2407.21783, section 3.3.2): with grouped heads they are small, and
any document mask is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from qwen2kit_torch.attention import Attend


def chunks_of(rank: int, size: int) -> tuple[int, ...]:
    """The chunks of a row that process ``rank`` of ``size`` holds, in its order."""
    return (0,) if size == 1 else (rank, 2 * size - 1 - rank)


def positions_of(rank: int, size: int, length: int) -> NDArray[np.int64]:
    """Indices into a row of ``length`` tokens that process ``rank`` of ``size`` holds."""
    count = 1 if size == 1 else 2 * size
    chunk = length // count
    parts = [np.arange(c * chunk, (c + 1) * chunk) for c in chunks_of(rank, size)]
    return np.concatenate(parts)


def gathered_positions(size: int, length: int) -> NDArray[np.int64]:
    """Index into the row of every token in the order in which processes are gathered."""
    return np.concatenate([positions_of(rank, size, length) for rank in range(size)])


@dataclass(frozen=True, slots=True)
class GatheredAttend:
    """Attention of this process's queries over the keys and values of all processes.

    Attributes:
        group: the ``cp`` axis.
        inner: attends to keys in the order of `gathered_positions`.
    """

    group: dist.ProcessGroup
    inner: Attend

    def __call__(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        """``[B, H, T, C]`` for this process's T queries (and as many keys)."""
        # Token by token, as they were computed and as flash attention reads them.
        pair = torch.stack((k_BKSC.transpose(1, 2), v_BKSC.transpose(1, 2)))
        k, v = all_gather_tensor_autograd(pair, 2, self.group).transpose(2, 3).unbind(0)
        return self.inner(q_BHTC, k, v)
