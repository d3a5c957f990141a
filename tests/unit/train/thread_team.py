"""Several processes of a run, played by threads: the same collectives without a framework."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class _Table:
    """Where the members of a team put what they say."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=300)
        self.said: list[Any] = [None] * world


class Member:
    """One process, as `qwen2kit.backend.processes.Processes` has it.

    Attributes:
        votes: calls of ``any`` so far.
    """

    def __init__(self, table: _Table, rank: int, world: int) -> None:
        self._table = table
        self.rank, self.world = rank, world
        self.votes = 0

    def any(self, flag: bool) -> bool:
        self.votes += 1
        return any(self._exchange(flag))

    def share(self, value: Any) -> Any:
        return self._exchange(value)[0]

    def close(self) -> None:
        self._exchange(None)

    def _exchange(self, value: Any) -> list[Any]:
        self._table.said[self.rank] = value
        self._table.barrier.wait()
        said = list(self._table.said)
        self._table.barrier.wait()
        return said


def play(world: int, part: Callable[[Member], T]) -> list[T | Exception]:
    """What ``part`` returns or raises on every member. A member that is left alone raises
    ``BrokenBarrierError``, so that a test of a hang fails instead of hanging."""
    table = _Table(world)

    def run(rank: int) -> T | Exception:
        try:
            return part(Member(table, rank, world))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
