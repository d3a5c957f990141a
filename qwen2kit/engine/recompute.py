"""`Slots` without a cache: every feed runs its whole sequence again.

The reference that real slots are compared with, and what a new backend may start from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count as numbers

from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.slots import Feed
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.errors import BackendError


class RecomputingSlots:
    """Implements `qwen2kit.backend.slots.Slots` by `CompiledModel.logits` alone.

    Args:
        model: loaded.
        count: sequences at a time.
        capacity: tokens per sequence.

    Raises:
        BackendError: ``count`` is not positive, or ``capacity`` beyond what the model takes.
    """

    def __init__(self, model: CompiledModel, count: int, capacity: int) -> None:
        if count < 1 or not 1 <= capacity <= model.limit:
            raise BackendError(
                f"{count} slots of {capacity} tokens are impossible; a slot of this model holds "
                f"1 to {model.limit} tokens"
            )
        self.count = count
        self.capacity = capacity
        self._model = model
        self._held: list[list[int]] = [[] for _ in range(count)]

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        """One full pass per slot."""
        import numpy as np

        assert len({feed.slot for feed in feeds}) == len(feeds), "a slot is fed twice"
        rows = [np.empty((0, self._model.spec.vocab_size), dtype=np.float32)]
        for feed in feeds:
            held = self._held[feed.slot]
            assert feed.start <= len(held), "the slot does not hold that much"
            held[feed.start :] = feed.tokens
            assert len(held) <= self.capacity, "the slot is too small"
            assert 0 <= feed.wanted <= len(feed.tokens) > 0
            if feed.wanted:
                rows.append(np.asarray(self._model.logits(held), np.float32)[-feed.wanted :])
        return HostLogits(np.concatenate(rows))

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        """Step by step; nothing runs ahead."""
        for _ in numbers() if most is None else range(most):
            found = self.feed(feeds).greedy(limit)
            yield found
            feeds = [
                Feed(feed.slot, len(self._held[feed.slot]), (max(token, 0),))
                for feed, token in zip(feeds, found, strict=True)
            ]
            if any(feed.start == self.capacity for feed in feeds):
                return

    def copy(self, source: int, target: int, length: int) -> None:
        """Tokens are all there is to copy."""
        assert length <= len(self._held[source]), "the slot does not hold that much"
        self._held[target] = self._held[source][:length]

    def clear(self, slot: int) -> None:
        """Forget its tokens."""
        self._held[slot] = []

    def close(self) -> None:
        """Forget everything."""
        self._held = []
