"""What every slot holds, and where a new prompt goes so that least is computed again."""

from __future__ import annotations

from typing import NamedTuple

from qwen2kit.engine.request import Request
from qwen2kit.engine.sequence import Sequence, start
from qwen2kit.generate.sampling import Sampling

WORTH_COPYING = 32
"""Tokens from which on copying a prefix between slots is quicker than computing it."""


class Place(NamedTuple):
    """Where a prompt goes.

    Attributes:
        slot: it is overwritten from position ``keep`` on.
        source: slot whose first ``keep`` positions are wanted; ``slot`` itself where they lie.
        keep: prompt tokens that need not be computed.
    """

    slot: int
    source: int
    keep: int


class SlotTable:
    """Sequences by slot; those that have ended stay as a cache until their slot is taken.

    Args:
        count: slots.
    """

    def __init__(self, count: int) -> None:
        self._held: list[Sequence | None] = [None] * count
        self._free = set(range(count))

    @property
    def free(self) -> int:
        """Slots that a prompt may take."""
        return len(self._free)

    def find(self, prompt: list[int]) -> Place | None:
        """The best place for ``prompt``; None if a sequence that is still reading its own prompt
        will soon hold much more of this one than any place does now.

        At least one token is left to compute. A slot must be free. A cached sequence is built
        upon where it lies if at most as much of it is lost as is kept; otherwise the slot that
        was left longest ago is taken, and a long prefix is copied there.
        """
        usable = [0] * len(self._held)
        promised = 0
        for slot, held in enumerate(self._held):
            if held is not None and held.tokens[0] == prompt[0]:
                common = min(common_prefix(prompt, held.tokens), len(prompt) - 1)
                if held.ended is None and held.fed < common:
                    promised = max(promised, common)
                else:
                    usable[slot] = min(common, held.fed)
        place = self._place(usable)
        return None if promised - place.keep >= WORTH_COPYING else place

    def take(self, place: Place, sequence: Sequence) -> None:
        """``sequence`` now holds ``place.slot``."""
        self._free.remove(place.slot)
        self._held[place.slot] = sequence
        sequence.slot, sequence.fed = place.slot, place.keep

    def leave(self, sequence: Sequence, now: int) -> None:
        """``sequence`` has ended at time ``now``; what it fed stays until the slot is taken."""
        sequence.ended = now
        self._free.add(sequence.slot)

    def longest(self, tokens: list[int]) -> tuple[int, int]:
        """A slot that holds as many of the first ``tokens`` as any does, and how many."""
        common = [
            0 if held is None else min(common_prefix(tokens, held.tokens), held.fed)
            for held in self._held
        ]
        best = max(range(len(common)), key=common.__getitem__)
        return best, common[best]

    def forget_oldest(self) -> int:
        """The free slot that was left longest ago, now empty."""
        slot = min(self._free, key=self._left)
        self._held[slot] = None
        return slot

    def put(self, slot: int, tokens: list[int], now: int) -> None:
        """A free slot now holds ``tokens``, all of them fed."""
        sequence = start(-1, Request(tuple(tokens), Sampling()), len(tokens))
        sequence.slot, sequence.fed, sequence.ended = slot, len(tokens), now
        self._held[slot] = sequence

    def _place(self, usable: list[int]) -> Place:
        source = max(range(len(usable)), key=usable.__getitem__)
        keep = usable[source]
        if source in self._free and self._length(source) <= 2 * keep:
            return Place(source, source, keep)
        oldest = min(self._free, key=self._left)
        if keep - usable[oldest] >= WORTH_COPYING:
            return Place(oldest, source, keep)
        return Place(oldest, oldest, usable[oldest])

    def _length(self, slot: int) -> int:
        held = self._held[slot]
        return 0 if held is None else held.fed

    def _left(self, slot: int) -> int:
        held = self._held[slot]
        return -1 if held is None or held.ended is None else held.ended


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens ``one`` and ``other`` begin with in common."""
    limit = min(len(one), len(other))
    low, step = 0, 32
    while low < limit:
        high = min(low + step, limit)
        if one[low:high] == other[low:high]:
            low, step = high, 2 * step
        elif step > 32:
            step = 32
        else:
            return next(i for i in range(low, high) if one[i] != other[i])
    return limit
