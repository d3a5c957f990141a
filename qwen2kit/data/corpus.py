"""Tokenised examples in three flat arrays, so that a corpus costs five bytes per token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from qwen2kit.data.packing import Examples, Span
from qwen2kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Corpus:
    """Examples one after the other.

    Attributes:
        tokens: int32 ``[N]``.
        supervised: bool ``[N]``: whether the token is to be predicted.
        offsets: int64 ``[examples + 1]``; example ``i`` is ``offsets[i]:offsets[i + 1]``.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, int64 ``[examples]``."""
        return np.diff(self.offsets)

    def span(self, start: int, stop: int) -> Span:
        """Tokens ``start:stop`` of all, whichever examples they belong to."""
        return self.tokens[start:stop], self.supervised[start:stop]

    def read(self, example: int, begin: int, count: int) -> Span:
        """``count`` tokens of ``example`` from ``begin`` on."""
        start = int(self.offsets[example]) + begin
        return self.span(start, start + count)

    def select(self, indices: NDArray[np.int64]) -> Corpus:
        """The examples at ``indices``, in that order."""
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in indices]
        lengths = self.lengths[indices]
        return Corpus(
            np.concatenate([self.tokens[s] for s in spans] or [self.tokens[:0]]),
            np.concatenate([self.supervised[s] for s in spans] or [self.supervised[:0]]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the contents: resuming on other data is refused by comparing it."""
        digest = sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(np.packbits(self.supervised).tobytes())
        return digest.hexdigest()


def collect(examples: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Corpus:
    """Gather streamed ``(tokens, supervised)`` examples; nothing else is kept in memory."""
    tokens, supervised, offsets = array("i"), array("b"), array("q", [0])
    for ids, flags in examples:
        tokens.extend(ids)
        supervised.extend(flags)
        offsets.append(len(tokens))
    return Corpus(
        np.array(tokens, dtype=np.int32),
        np.array(supervised, dtype=np.bool_),
        np.array(offsets, dtype=np.int64),
    )


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of ``count`` items in ``epoch``: a function of its arguments and nothing else."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(count).astype(np.int64)


_SPLIT_EPOCH = 2**64 - 1


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split off a random ``fraction`` of the examples (at least one): ``(train, held_out)``.

    Raises:
        DataError: nothing is left to train on.
    """
    order = permutation(len(examples), seed, _SPLIT_EPOCH)
    count = max(1, round(fraction * len(examples)))
    if count == len(examples):
        raise DataError("eval.fraction leaves no example to train on; lower it")
    return examples.select(np.sort(order[count:])), examples.select(np.sort(order[:count]))
