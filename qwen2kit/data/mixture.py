"""Rows of several sources in fixed proportions, interleaved by a rule without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import TokenBatch
from qwen2kit.data.row_source import FIELDS, RowSource, State
from qwen2kit.errors import DataError

# 2^64 over the golden ratio: multiples of it modulo 2^64 are spread as evenly as can be, so that
# every stretch of rows holds its sources in proportion (Weyl sequence; Knuth, TAOCP 3, 6.4).
_STRIDE = np.uint64(0x9E3779B97F4A7C15)


class MixedRows:
    """A `RowSource` that draws from ``sources``. Each goes through its own epochs.

    Args:
        sources: at least one.
        weights: positive, relative.
        seed: of the interleaving.
        note: is told when a source starts its next epoch.
    """

    table = None

    def __init__(
        self,
        sources: Sequence[RowSource],
        weights: Sequence[float],
        seed: int,
        note: Callable[[str], None],
    ) -> None:
        self._sources = sources
        self._bounds = _bounds(weights)
        self._offset = np.uint64(source_seed(seed, -1))
        self._note = note
        self._row = 0

    @property
    def epoch(self) -> int:
        """How often the least visited source has been gone through."""
        return min(source.epoch for source in self._sources)

    def owners(self, first: int, count: int) -> NDArray[np.int64]:
        """The source of each of ``count`` rows from row number ``first`` on."""
        numbers = np.arange(first, first + count, dtype=np.uint64)
        places = self._offset + numbers * _STRIDE
        return np.searchsorted(self._bounds, places, side="right")

    def take(self, count: int, mine: range) -> TokenBatch:
        owners = self.owners(self._row, count)
        inside = np.zeros(count, dtype=np.bool_)
        inside[mine.start : mine.stop] = True
        parts = {}
        for number in np.unique(owners).tolist():
            source, wanted = self._sources[number], inside[owners == number]
            first, before = int(np.argmax(wanted)), source.epoch
            parts[number] = source.take(len(wanted), range(first, first + int(wanted.sum())))
            for epoch in range(before + 1, source.epoch + 1):
                self._note(f"source {number + 1} of the mixture starts epoch {epoch + 1}")
        self._row += count
        return _interleave(parts, owners[mine.start : mine.stop])

    def state(self) -> State:
        return {"row": self._row, "sources": [source.state() for source in self._sources]}

    def restore(self, state: State) -> None:
        if len(state["sources"]) != len(self._sources):
            raise DataError(
                f"the run was started with {len(state['sources'])} sources in its mixture, the "
                f"recipe now has {len(self._sources)}; undo the change"
            )
        for source, place in zip(self._sources, state["sources"], strict=True):
            source.restore(place)
        self._row = state["row"]

    def fingerprint(self) -> str:
        parts = [source.fingerprint() for source in self._sources]
        text = " ".join([*parts, *(str(bound) for bound in self._bounds)])
        return sha256(text.encode()).hexdigest()

    def close(self) -> None:
        for source in self._sources:
            source.close()


def source_seed(seed: int, number: int) -> int:
    """A seed for one source (63 bits), so that equal sources are not shuffled equally."""
    digest = sha256(f"{seed} source {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _bounds(weights: Sequence[float]) -> NDArray[np.uint64]:
    """Where, on ``[0, 2^64)``, the share of one source ends and the next begins."""
    ends = np.cumsum(np.array(weights, dtype=np.float64))[:-1] / np.sum(weights)
    return np.array([min(int(end * 2.0**64), 2**64 - 1) for end in ends], dtype=np.uint64)


def _interleave(parts: dict[int, TokenBatch], owners: NDArray[np.int64]) -> TokenBatch:
    seq_len = next(iter(parts.values())).tokens.shape[1]
    whole = [np.empty((len(owners), seq_len), dtype=np.int32) for _ in FIELDS]
    for number, part in parts.items():
        for rows, name in zip(whole, FIELDS, strict=True):
            rows[owners == number] = getattr(part, name)
    return TokenBatch(*whole)
