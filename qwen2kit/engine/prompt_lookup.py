"""Guesses copied from the text itself: what followed the same words the last time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qwen2kit.engine.acceptance import Acceptance
from qwen2kit.engine.drafting import Unfinished
from qwen2kit.engine.request import Request
from qwen2kit.errors import ConfigError

_COST: Final = 0.02


class PromptLookup:
    """A `qwen2kit.engine.drafting.Drafter` without a model.

    Looks in prompt and output for an earlier place that ends like the sequence does, the longest
    such ending first and the latest such place, and guesses what follows there. A place so near
    that the text repeats itself is read round and round.

    Args:
        longest: most tokens of a guess.
        shortest_match: tokens that must agree at least.
        longest_match: tokens beyond which endings are not compared.

    Raises:
        ConfigError: ``longest`` is not positive.
    """

    def __init__(
        self, longest: int = 16, *, shortest_match: int = 2, longest_match: int = 8
    ) -> None:
        if longest < 1:
            raise ConfigError(f"prompt lookup must guess at least 1 token, got {longest}")
        self._longest = longest
        self._shortest = shortest_match
        self._deepest = longest_match
        self._texts: dict[int, _Text] = {}

    def begin(self, key: int, request: Request) -> None:
        """See `Drafter`."""
        self._texts[key] = _Text(Acceptance(_COST, self._longest))

    def propose(self, sequences: Sequence[Unfinished]) -> list[tuple[int, ...]]:
        """See `Drafter`."""
        return [self._guess(self._texts[item.key], item) for item in sequences]

    def forget(self, key: int) -> None:
        """See `Drafter`."""
        self._texts.pop(key, None)

    def close(self) -> None:
        """See `Drafter`."""
        self._texts.clear()

    def _guess(self, text: _Text, item: Unfinished) -> tuple[int, ...]:
        text.acceptance.observe(item.tokens)
        ids = text.extend(item.tokens)
        place = _last_place(ids, self._shortest, self._deepest)
        count = 0 if place is None else text.acceptance.length(item.limit)
        guess: tuple[int, ...] = ()
        if place is not None and count:
            guess = tuple(ids[place + np.arange(count) % (len(ids) - place)].tolist())
        text.acceptance.remember(guess, item.tokens)
        return guess


class _Text:
    """Ids of one sequence in an array that grows, and how guessing has gone."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self._ids = np.empty(0, dtype=np.int64)
        self._count = 0

    def extend(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Take over what is new at the end of ``tokens``; all of them."""
        if len(tokens) > len(self._ids):
            grown = np.empty(2 * len(tokens), dtype=np.int64)
            grown[: self._count] = self._ids[: self._count]
            self._ids = grown
        self._ids[self._count : len(tokens)] = tokens[self._count :]
        self._count = len(tokens)
        return self._ids[: self._count]


def _last_place(ids: NDArray[np.int64], shortest: int, deepest: int) -> int | None:
    """Where the continuation of the latest place with the longest common ending starts."""
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    matched = 1
    while len(ends) and matched < min(deepest, len(ids) - 1):
        longer = ends[(ends >= matched) & (ids[ends - matched] == ids[-1 - matched])]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    return int(ends[-1]) + 1 if len(ends) and matched >= shortest else None
