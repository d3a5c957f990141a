"""Guessing the next tokens cheaply, for the model to check several in one pass.

A guess never changes what comes out: the engine draws every position from the model's own logits
and keeps a drafted token only where the draw is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from qwen2kit.engine.request import Request
from qwen2kit.generate.sampling import Sampler


class Unfinished(NamedTuple):
    """A sequence to guess the continuation of.

    Attributes:
        key: the request's.
        tokens: prompt and everything drawn so far; grows in place, not to be modified.
        limit: most tokens that are of use, at least 1.
        sampler: the one that will draw the next tokens; to be forked (`Sampler.fork`), not used.
    """

    key: int
    tokens: Sequence[int]
    limit: int
    sampler: Sampler


class Drafter(Protocol):
    """Proposes continuations; one engine owns it and tells it what becomes of its requests."""

    def begin(self, key: int, request: Request) -> None:
        """A request has been admitted."""
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
