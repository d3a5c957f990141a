"""Greedy decoding that leaves the choice to the device, so that it need not wait for the host."""

from __future__ import annotations

from collections.abc import Iterator

from qwen2kit.backend.slots import Feed, Slots
from qwen2kit.engine.sequence import Sequence


class RunAhead:
    """A `Slots.run_greedy` in progress.

    Sequences that end are carried along unheard until they are too many to be worth it.

    Args:
        slots: where the sequences are.
        sequences: all plain greedy with one vocabulary limit, one token unfed each.
    """

    def __init__(self, slots: Slots, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        limit = sequences[0].request.sampling.vocab_limit
        feeds = [Feed(item.slot, item.fed, (item.tokens[-1],)) for item in sequences]
        self._ids: Iterator[list[int]] = slots.run_greedy(feeds, limit)

    @property
    def worthwhile(self) -> bool:
        """Whether enough of the sequences still go on."""
        ended = sum(item.ended is not None for item in self.sequences)
        return 8 * ended <= len(self.sequences) and ended < len(self.sequences)

    def step(self) -> list[tuple[Sequence, int]] | None:
        """The next token of every sequence that goes on; None if the device has stopped."""
        ids = next(self._ids, None)
        if ids is None:
            return None
        pairs = zip(self.sequences, ids, strict=True)
        return [(item, token) for item, token in pairs if item.ended is None]

    def close(self) -> None:
        """Stop the device; the last token handed out counts as not fed."""
        close = getattr(self._ids, "close", None)
        if close is not None:
            close()


def can_run_ahead(sequences: list[Sequence]) -> bool:
    """Whether the device can choose the next tokens of all ``sequences`` by itself."""
    return (
        bool(sequences)
        and all(item.plain and item.unfed == 1 for item in sequences)
        and len({item.request.sampling.vocab_limit for item in sequences}) == 1
    )
