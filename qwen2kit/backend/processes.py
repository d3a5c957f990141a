"""The processes of one run, as core sees them: who am I, and a few words with the others."""

from __future__ import annotations

from typing import Any, Protocol


class Processes(Protocol):
    """All processes of a run. Every method is collective: all processes call it.

    Attributes:
        rank: number of this process, from 0; process 0 writes files and talks to people.
        world: how many there are.
    """

    rank: int
    world: int

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process."""
        ...

    def share(self, value: Any) -> Any:
        """Process 0's ``value`` (JSON data) on every process."""
        ...

    def close(self) -> None:
        """Leave; the last call of a run."""
        ...


class SingleProcess:
    """A run that consists of this process alone."""

    rank = 0
    world = 1

    def any(self, flag: bool) -> bool:
        """``flag`` itself."""
        return flag

    def share(self, value: Any) -> Any:
        """``value`` itself."""
        return value

    def close(self) -> None:
        """Nothing to leave."""
