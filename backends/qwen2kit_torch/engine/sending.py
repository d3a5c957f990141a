"""Numbers from the host to a device that has not yet done what it was told before.

From memory that can be paged out a copy waits for all that; from pinned memory it takes its turn,
and PyTorch keeps what it reads until then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def sent(values: ArrayLike, device: torch.device, dtype: Any = None) -> Tensor:
    """``values`` as a tensor on ``device``, of NumPy's ``dtype`` (theirs if None)."""
    given = _host(np.asarray(values, dtype), device)
    return given.to(device, non_blocking=True)


def send(values: NDArray[Any], to: Tensor) -> None:
    """Copy ``values`` into a tensor of that shape."""
    to.copy_(_host(values, to.device), non_blocking=True)


def _host(values: NDArray[Any], device: torch.device) -> Tensor:
    given = torch.from_numpy(values)
    return given.pin_memory() if device.type == "cuda" else given
