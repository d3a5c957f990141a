"""What a device can do at best, measured: an optional power of backends, for `qwen2kit bench`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

from qwen2kit.backend.plan import ExecutionPlan

_ROUNDS: Final = 3
_REPEATS: Final = 8


class DeviceMeter(Protocol):
    """Rates of one device in one compute dtype.

    Attributes:
        dtype: the compute dtype's name, ``auto`` resolved.
    """

    dtype: str

    def copy_bandwidth(self) -> float:
        """Bytes per second read and written (both counted) while copying a large array."""
        ...

    def matmul_rate(self) -> float:
        """FLOP per second of a large product of matrices in the compute dtype."""
        ...

    def reset_peak(self) -> None:
        """Start `peak_memory` anew, where the device can."""
        ...

    def peak_memory(self) -> int | None:
        """Most bytes held on the device since then (on a CPU: by the process, since its start)."""
        ...


@runtime_checkable
class MeteredBackend(Protocol):
    """A backend whose devices can be measured."""

    def meter(self, plan: ExecutionPlan) -> DeviceMeter:
        """The meter of the device and dtype that a model compiled with ``plan`` uses."""
        ...


def seconds_of(work: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Time of one repetition of ``work``, the best of three rounds after a first that warms up.

    Args:
        work: starts what is timed.
        wait: returns when the device has done all that was started.
    """
    work()
    rounds = []
    for _ in range(_ROUNDS):
        wait()
        started = time.perf_counter()
        for _ in range(_REPEATS):
            work()
        wait()
        rounds.append((time.perf_counter() - started) / _REPEATS)
    return min(rounds)


def process_peak() -> int | None:
    """Most bytes of memory this process has held, None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
