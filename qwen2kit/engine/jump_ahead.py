"""Guesses that cannot be wrong: text that a grammar forces, such as the keys of a JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from qwen2kit.engine.drafting import Drafter, Unfinished
from qwen2kit.engine.request import Constraint, Request


@runtime_checkable
class ForcingConstraint(Constraint, Protocol):
    """A constraint that knows when there is no choice."""

    def forced(self) -> tuple[int, ...]:
        """Ids that must come next; empty where there is a choice."""
        ...


class JumpAhead:
    """A `qwen2kit.engine.drafting.Drafter` for requests with such a constraint.

    Args:
        other: guesses where nothing is forced; None does not.
    """

    def __init__(self, other: Drafter | None = None) -> None:
        self._other = other
        self._constraints: dict[int, ForcingConstraint] = {}

    def begin(self, key: int, request: Request) -> None:
        """See `Drafter`."""
        if isinstance(request.constraint, ForcingConstraint):
            self._constraints[key] = request.constraint
        if self._other is not None:
            self._other.begin(key, request)

    def propose(self, sequences: Sequence[Unfinished]) -> list[tuple[int, ...]]:
        """See `Drafter`."""
        forced = {
            item.key: self._constraints[item.key].forced()[: item.limit]
            for item in sequences
            if item.key in self._constraints
        }
        free = [item for item in sequences if not forced.get(item.key)]
        guesses = [()] * len(free) if self._other is None else self._other.propose(free)
        forced |= {item.key: guess for item, guess in zip(free, guesses, strict=True)}
        return [forced[item.key] for item in sequences]

    def forget(self, key: int) -> None:
        """See `Drafter`."""
        self._constraints.pop(key, None)
        if self._other is not None:
            self._other.forget(key)

    def close(self) -> None:
        """See `Drafter`."""
        self._constraints.clear()
        if self._other is not None:
            self._other.close()
