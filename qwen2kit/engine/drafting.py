"""Guessing the next tokens cheaply, for the model to check several in one pass.

A guess never changes what comes out: the engine draws every position from the model's own logits
and keeps a drafted token only where the draw is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Unfinished(NamedTuple):
    """A sequence to guess the continuation of.

    Attributes:
        key: the request's.
        tokens: prompt and everything drawn so far; grows in place, not to be modified.
        limit: most tokens that are of use, at least 1.
    """

    key: int
    tokens: Sequence[int]
    limit: int


class Drafter(Protocol):
    """Proposes continuations; one engine owns it and tells it what becomes of its requests."""

    def begin(self, key: int, prompt: Sequence[int]) -> None:
        """A request with these prompt ids has been admitted."""
        ...

    def propose(self, sequences: Sequence[Unfinished]) -> list[tuple[int, ...]]:
        """One guess per sequence: 0 to ``limit`` ids. What was right of the last guess shows in
        ``tokens``."""
        ...

    def forget(self, key: int) -> None:
        """The request is over."""
        ...

    def close(self) -> None:
        """Give memory back; idempotent."""
        ...
