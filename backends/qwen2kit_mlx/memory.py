"""How many slots a device holds, saying that it is full, and keeping a Mac from paging the model
out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit_mlx.columns import BLOCK
from qwen2kit_mlx.packed_columns import group_size

USABLE = 0.9  # of the device's memory; the rest is for activations and other programs


def token_bytes(spec: ModelSpec, dtype: mx.Dtype, bits: int | None) -> int:
    """Bytes that keys and values of one token take in all layers."""
    numbers = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim
    group = group_size(spec.head_dim)
    if bits is None or group is None:
        return numbers * dtype.size
    return numbers * bits // 8 + 2 * dtype.size * numbers // group


def slots_that_fit(count: int, capacity: int, per_token: int, free: int | None) -> int:
    """At most ``count``.

    Args:
        count: wanted.
        capacity: tokens per slot.
        per_token: bytes of a token, see `token_bytes`.
        free: bytes there are; None if unknown.

    Raises:
        BackendError: not even one fits.
    """
    if free is None:
        return count
    slot = -(-capacity // BLOCK) * BLOCK * per_token
    fitting = max(0, free) // slot
    if not fitting:
        raise BackendError(
            f"a slot of {capacity} tokens takes {slot / 1e9:.1f} GB, {max(0, free) / 1e9:.1f} GB "
            "are free; ask for fewer tokens (serve: --context), or use --cache-bits 8 or 4"
        )
    return int(min(count, fitting))


# MLX raises RuntimeError: Metal's buffers and command buffers, CUDA's pools, any allocator.
_FULL = re.compile(
    r"unable to allocate|attempting to allocate|insufficient memory|out of memory|OutOfMemory",
    re.IGNORECASE,
)


@contextmanager
def bounded_by_memory(instead: str) -> Iterator[None]:
    """Say in one line that the device is full. Also a decorator. Must contain the moment in which
    arrays are computed, not only the one in which they are asked for.

    Args:
        instead: what would need less.

    Raises:
        BackendError: the device is out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if _FULL.search(str(error)) is None:
            raise
        raise BackendError(f"the device ran out of memory; use {instead}") from error


def free_bytes(device: mx.Device) -> int | None:
    """Usable memory of ``device`` that MLX does not hold yet; None if the system does not say."""
    total = _total(device)
    return None if total is None else int(USABLE * total) - mx.get_active_memory()


def _total(device: mx.Device) -> int | None:
    info = mx.device_info(device)
    names = ("max_recommended_working_set_size", "memory_size", "total_memory")
    total = next((info[name] for name in names if name in info), None)
    if total is None and device.type == mx.cpu and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total if isinstance(total, int) else None


class Wired:
    """While it is entered, Metal keeps what MLX uses resident, if the model fits at all. Does
    nothing elsewhere. May be entered by several at a time; the last one out restores the limit.

    A model that is paged out between tokens is read from disk for each of them.
    """

    _entered = 0
    _before = 0

    def __enter__(self) -> Wired:
        if mx.metal.is_available():
            limit = int(mx.device_info()["max_recommended_working_set_size"])
            if mx.get_active_memory() <= USABLE * limit:
                if not Wired._entered:
                    Wired._before = mx.set_wired_limit(limit)
                Wired._entered += 1
                self._inside = True
                return self
        self._inside = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._inside:
            self._inside = False
            Wired._entered -= 1
            if not Wired._entered:
                mx.synchronize()
                mx.set_wired_limit(Wired._before)
