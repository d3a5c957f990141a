"""What every slot holds, and where a new prompt goes so that least is computed again."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, NamedTuple

from qwen2kit.engine.sequence import Sequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    """Tokens by slot; those of ended sequences stay as a cache until their slot is taken.

    What a running sequence says is known when it ends; its prompt at once.

    Args:
        count: slots.
        capacity: tokens of each.
    """

    def __init__(self, count: int, capacity: int) -> None:
        import numpy as np

        self._tokens = np.zeros((count, capacity), dtype=np.int32)
        self._lengths = np.zeros(count, dtype=np.int64)
        self._left = [-1] * count
        self._running: dict[int, Sequence] = {}
        self._free = set(range(count))

    @property
    def free(self) -> int:
        """Slots that a prompt may take."""
        return len(self._free)

    def find(self, prompt: Tokens[int]) -> Place | None:
        """The best place for ``prompt``; None if a sequence that is still reading its own prompt
        will soon hold much more of this one than any place does now.

        At least one token is left to compute. A slot must be free. A cached sequence is built
        upon where it lies if at most as much of it is lost as is kept; otherwise the slot that
        was left longest ago is taken, and a long prefix is copied there.
        """
        usable = self._common(prompt[:-1]).tolist()
        promised = 0
        for slot, running in self._running.items():
            if running.fed < usable[slot]:
                promised, usable[slot] = max(promised, usable[slot]), 0
        place = self._place(usable)
        return None if promised - place.keep >= WORTH_COPYING else place

    def take(self, place: Place, sequence: Sequence) -> None:
        """``sequence`` now holds ``place.slot``."""
        self._free.remove(place.slot)
        self._running[place.slot] = sequence
        self._write(place.slot, 0, sequence.tokens)
        sequence.slot, sequence.fed = place.slot, place.keep

    def leave(self, sequence: Sequence, now: int) -> None:
        """``sequence`` has ended at time ``now``; what it fed stays until the slot is taken."""
        slot, written = sequence.slot, int(self._lengths[sequence.slot])
        self._write(slot, min(written, sequence.fed), sequence.tokens[written : sequence.fed])
        del self._running[slot]
        self._free.add(slot)
        sequence.ended = self._left[slot] = now

    def lend(self, tokens: Tokens[int], most: int) -> Place | None:
        """`find` a place for tokens that are no sequence's, with ``most`` of them at most. Until
        it comes back its slot counts as taken, and as holding no more."""
        found = self.find(tokens)
        if found is None:
            return None
        place = found._replace(keep=min(found.keep, most))
        self._free.remove(place.slot)
        self._write(place.slot, 0, tokens[: place.keep])
        return place

    def take_back(self, slot: int, tokens: Tokens[int], now: int) -> None:
        """A lent slot is free again and holds ``tokens``."""
        self._free.add(slot)
        self.put(slot, tokens, now)

    def longest(self, tokens: Tokens[int]) -> tuple[int, int]:
        """A slot that holds as many of the first ``tokens`` as any does, and how many."""
        common = self._common(tokens).tolist()
        for slot, running in self._running.items():
            common[slot] = min(common[slot], running.fed)
        best = max(range(len(common)), key=common.__getitem__)
        return best, common[best]

    def oldest(self) -> int:
        """The free slot that was left longest ago."""
        return min(self._free, key=self._left.__getitem__)

    def put(self, slot: int, tokens: Tokens[int], now: int) -> None:
        """A free slot holds ``tokens``, or nothing."""
        self._write(slot, 0, tokens)
        self._left[slot] = now

    def _common(self, tokens: Tokens[int]) -> NDArray[np.int64]:
        """How many tokens every slot's text has in common with the beginning of ``tokens``."""
        import numpy as np

        count = min(len(tokens), self._tokens.shape[1])
        if not count:
            return np.zeros_like(self._lengths)
        other = self._tokens[:, :count] != np.asarray(tokens[:count], dtype=np.int32)
        first = np.where(other.any(axis=1), other.argmax(axis=1), count)
        return np.minimum(first, self._lengths)

    def _place(self, usable: list[int]) -> Place:
        source = max(range(len(usable)), key=usable.__getitem__)
        keep = usable[source]
        if source in self._free and self._lengths[source] <= 2 * keep:
            return Place(source, source, keep)
        oldest = self.oldest()
        if keep - usable[oldest] >= WORTH_COPYING:
            return Place(oldest, source, keep)
        return Place(oldest, oldest, usable[oldest])

    def _write(self, slot: int, start: int, tokens: Tokens[int]) -> None:
        self._tokens[slot, start : start + len(tokens)] = tokens
        self._lengths[slot] = start + len(tokens)
