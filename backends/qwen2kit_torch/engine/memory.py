"""A device that runs out of memory in the middle of generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from qwen2kit.errors import BackendError

P = ParamSpec("P")
T = TypeVar("T")


def bounded_by_memory(work: Callable[P, T]) -> Callable[P, T]:
    """``work`` that says in one line what to lower.

    Raises:
        BackendError: the device is out of memory.
    """

    @wraps(work)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                "the device ran out of memory while generating; use fewer slots or a shorter "
                "context, --weight-bits 4, or another device"
            ) from error

    return checked
