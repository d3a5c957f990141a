"""Errors among several processes: if one fails, all stop, and one of them says why, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qwen2kit.backend.processes import Processes
from qwen2kit.errors import PeerError, Qwen2KitError

T = TypeVar("T")


def together(processes: Processes, work: Callable[[], T]) -> T:
    """The result of ``work`` on this process, once it has succeeded on all (collective).

    Raises:
        Exception: what ``work`` raised, on the failing process of the lowest rank.
        PeerError: on the others.
    """
    try:
        result = work()
    except Exception as error:
        settle(processes, error)
        raise
    settle(processes, None)
    return result


def settle(processes: Processes, error: Exception | None) -> None:
    """Return if no process brings an error (collective); raise as `together` does otherwise."""
    if not processes.any(error is not None):
        return
    if processes.world == 1:
        assert error is not None
        raise error
    speaker = next(
        rank
        for rank in range(processes.world)
        if processes.any(error is not None and processes.rank == rank)
    )
    if error is None or processes.rank != speaker:
        raise PeerError(f"process {speaker} of this run failed") from error
    raise numbered(processes, error)


def numbered(processes: Processes, error: Exception) -> Exception:
    """``error``, whose message says which process it comes from (if that is not process 0)."""
    if processes.rank and isinstance(error, Qwen2KitError):
        error.args = (f"process {processes.rank}: {error}",)
    return error


def on_first(processes: Processes, work: Callable[[], T]) -> T:
    """What ``work`` (JSON data) returns on process 0, on every process (collective).

    Raises:
        Exception: as `together`; only process 0 runs ``work``.
    """
    first = processes.rank == 0
    result = together(processes, lambda: work() if first else None)
    shared: T = processes.share(result)
    return shared
