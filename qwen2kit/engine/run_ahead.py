"""Decoding that leaves the choice to the device, so that it need not wait for the host."""

from __future__ import annotations

from collections.abc import Iterator

from qwen2kit.backend.slots import BROKEN, DrawingSlots, Feed, Slots
from qwen2kit.engine.sequence import Sequence


class RunAhead:
    """A `Slots.run_greedy` or `DrawingSlots.run_drawn` in progress.

    Sequences that end are carried along unheard until they are too many to be worth it.

    Args:
        slots: where the sequences are.
        sequences: those for which `can_run_ahead` is true.
        most: steps after which it ends; None to go on until it is closed or slots are full.

    Attributes:
        sequences: as given.
        ends: whether ``most`` was given: closed before, it has computed for nothing.
    """

    def __init__(self, slots: Slots, sequences: list[Sequence], most: int | None = None) -> None:
        self.sequences, self.ends = sequences, most is not None
        feeds = [Feed(item.slot, item.fed, (item.tokens[-1],)) for item in sequences]
        self._draws = not _all_greedy(sequences)
        self._ids: Iterator[list[int]]
        if self._draws:
            assert isinstance(slots, DrawingSlots)
            courses = [item.sampler.course() for item in sequences]
            self._ids = slots.run_drawn(feeds, courses, most)
        else:
            self._ids = slots.run_greedy(feeds, sequences[0].request.sampling.vocab_limit, most)

    @property
    def worthwhile(self) -> bool:
        """Whether enough of the sequences still go on; one, where it will soon end by itself."""
        ended = sum(item.ended is not None for item in self.sequences)
        if self.ends:
            return ended < len(self.sequences)
        return 8 * ended <= len(self.sequences) and ended < len(self.sequences)

    def step(self) -> list[tuple[Sequence, int]] | None:
        """The next token of every sequence that goes on; None if the device has stopped."""
        ids = next(self._ids, None)
        if ids is None:
            return None
        pairs = zip(self.sequences, ids, strict=True)
        found = [(item, token) for item, token in pairs if item.ended is None]
        if self._draws:
            for item, token in found:
                if token != BROKEN:
                    item.sampler.accept(token)
        return found

    def close(self) -> None:
        """Stop the device; the last token handed out counts as not fed."""
        close = getattr(self._ids, "close", None)
        if close is not None:
            close()


def can_run_ahead(slots: Slots, sequences: list[Sequence]) -> bool:
    """Whether the device can choose the next tokens of all ``sequences`` by itself."""
    if not sequences or any(item.unfed != 1 for item in sequences):
        return False
    if _all_greedy(sequences):
        return True
    return isinstance(slots, DrawingSlots) and all(item.foreseen for item in sequences)


def _all_greedy(sequences: list[Sequence]) -> bool:
    limits = {item.request.sampling.vocab_limit for item in sequences}
    return len(limits) == 1 and all(item.plain for item in sequences)
