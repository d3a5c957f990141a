"""Order score requests so that every shared prefix is computed once.

Sorted by token ids, the requests are the leaves of their prefix tree in depth-first order: each
one needs only the tokens beyond its longest common prefix with the one before. A backend keeps
one KV cache, truncates it to ``keep`` and feeds ``feed``. Requests whose input is identical (the
choices of a multiple-choice question with one-token answers) become one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen2kit.backend.protocol import ScoreRequest


@dataclass(frozen=True, slots=True)
class Target:
    """Continuation tokens to look up: ``tokens[i]`` at the ``first + i``-th fed position."""

    request: int
    first: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreStep:
    """One forward pass.

    Attributes:
        keep: tokens of the previous step's input whose cache entries stay valid.
        feed: tokens to run after them (at least one).
        targets: what to read from the logits of the fed positions.
    """

    keep: int
    feed: tuple[int, ...]
    targets: tuple[Target, ...]

    @property
    def first_scored(self) -> int:
        """Index of the first fed position whose logits are needed."""
        return min(target.first for target in self.targets)


def plan_scores(requests: Sequence[ScoreRequest]) -> Iterator[ScoreStep]:
    """Steps that score all ``requests``; no token is computed twice along a shared prefix.

    Every position that must be scored is fed, even when an earlier step already computed it:
    logits are not kept.
    """
    inputs = [r.context + r.continuation[:-1] for r in requests]
    order = sorted(range(len(requests)), key=lambda i: (inputs[i], len(requests[i].context)))
    previous: tuple[int, ...] = ()
    start = 0
    while start < len(order):
        tokens = inputs[order[start]]
        end = start
        while end < len(order) and inputs[order[end]] == tokens:
            end += 1
        group = order[start:end]
        first_scored = min(len(requests[i].context) - 1 for i in group)
        keep = min(_common_prefix(previous, tokens), first_scored)
        targets = tuple(
            Target(i, len(requests[i].context) - 1 - keep, requests[i].continuation) for i in group
        )
        yield ScoreStep(keep, tokens[keep:], targets)
        previous, start = tokens, end


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
