"""Order score requests so that every shared prefix is computed once.

Sorted by token ids, the requests are the leaves of their prefix tree in depth-first order: each
one needs only the tokens beyond its longest common prefix with the one before. A backend keeps
one KV cache, truncates it to ``keep`` and feeds ``feed``. Requests whose input is identical (the
choices of a multiple-choice question with one-token answers) become one step.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from qwen2kit.backend.values import ScoreRequest

_TOKEN_BYTES = array("I").itemsize


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


def plan_scores(requests: Sequence[ScoreRequest]) -> Iterator[ScoreStep]:
    """Steps that score all ``requests``; no token is computed twice along a shared prefix.

    Every position that must be scored is fed, even when an earlier step already computed it:
    logits are not kept.
    """
    inputs = list(_sortable(requests))
    order = sorted(range(len(inputs)), key=lambda i: (inputs[i], len(requests[i].context)))
    previous = b""
    for tokens, same in groupby(order, key=inputs.__getitem__):
        group = list(same)
        first = requests[group[0]]
        keep = min(_common_prefix(previous, tokens), len(first.context) - 1)
        targets = tuple(
            Target(i, len(requests[i].context) - 1 - keep, requests[i].continuation) for i in group
        )
        yield ScoreStep(keep, (first.context + first.continuation[:-1])[keep:], targets)
        previous = tokens


def _sortable(requests: Iterable[ScoreRequest]) -> Iterator[bytes]:
    """Input tokens in four bytes each; bytes compare like the tokens, and much faster."""
    context: tuple[int, ...] | None = None
    head = b""
    for request in requests:
        if request.context is not context:  # requests may share one
            context, head = request.context, _big_endian(request.context)
        yield head + _big_endian(request.continuation[:-1])


def _big_endian(tokens: tuple[int, ...]) -> bytes:
    ids = array("I", tokens)
    if sys.byteorder == "little":
        ids.byteswap()
    return ids.tobytes()


def _common_prefix(a: bytes, b: bytes) -> int:
    """How many tokens two inputs have in common at the beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit // _TOKEN_BYTES
    x, y = (np.frombuffer(ids[:limit], dtype=np.uint32) for ids in (a, b))
    return int((x != y).argmax())
