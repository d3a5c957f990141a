"""Finding test texts in a stream of training texts by their 13-grams, then by subsequence.

The rule of the Qwen2 report's data section: a training sequence is contaminated by a test sequence
if both share a 13-gram and their longest common subsequence is at least 13 tokens and at least 0.6
of the shorter one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N = 13
"""Tokens of an n-gram, and least length of a common subsequence."""
SHARE = 0.6
"""Least length of a common subsequence relative to the shorter text."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_FACTORS = np.random.default_rng(13).integers(1 << 63, size=N, dtype=np.uint64) * 2 + 1


def tokens(text: str) -> list[str]:
    """Words without case, symbols and punctuation; each Chinese or Japanese character is one."""
    return _TOKEN.findall(text.casefold())


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A training text that shares a 13-gram with a test text.

    Attributes:
        test: index of the test text.
        lcs: whether the two satisfy the subsequence rule.
        window: the same with only as much of the training text as the test text is long on either
            side of the shared 13-gram; a long training text holds any short one as a subsequence.
    """

    test: int
    lcs: bool
    window: bool


class NgramIndex:
    """All 13-grams of some test texts.

    A text of fewer than 13 tokens has none and is never found.

    Args:
        texts: as `tokens` splits them.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self._texts = texts
        words = dict.fromkeys(word for text in texts for word in text)
        self._ids = {word: number for number, word in enumerate(words, 1)}
        self._owners: dict[int, list[int]] = defaultdict(list)
        for owner, text in enumerate(texts):
            for key in set(_hashes(self._numbers(text)).tolist()):
                self._owners[key].append(owner)
        self._keys = np.array(sorted(self._owners), np.uint64)

    def matches(self, text: Sequence[str]) -> Iterator[Match]:
        """The test texts that share a 13-gram with the training text ``text``."""
        hashes = _hashes(self._numbers(text))
        if not hashes.size or not self._keys.size:
            return
        nearest = np.minimum(np.searchsorted(self._keys, hashes), self._keys.size - 1)
        places: dict[int, list[int]] = defaultdict(list)
        for place in np.flatnonzero(self._keys[nearest] == hashes).tolist():
            for owner in self._owners[int(hashes[place])]:
                places[owner].append(place)
        for owner, found in places.items():
            test = self._texts[owner]
            whole = is_contaminated(text, test)
            yield Match(
                test=owner,
                lcs=whole,
                window=whole and any(self._near(text, test, place) for place in found),
            )

    def _numbers(self, text: Sequence[str]) -> NDArray[np.uint64]:
        """Word numbers; 0 for words that no test text has."""
        return np.array([self._ids.get(word, 0) for word in text], np.uint64)

    @staticmethod
    def _near(text: Sequence[str], test: Sequence[str], place: int) -> bool:
        window = text[max(0, place - len(test)) : place + N + len(test)]
        return is_contaminated(window, test)


def is_contaminated(train: Sequence[str], test: Sequence[str]) -> bool:
    """|LCS| >= 13 and |LCS| >= 0.6 min(|train|, |test|)."""
    common = lcs_length(train, test)
    return common >= N and common >= SHARE * min(len(train), len(test))


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): one step of big-integer
    arithmetic per item of the longer sequence."""
    short, long = sorted((first, second), key=len)
    masks: dict[str, int] = defaultdict(int)
    for place, item in enumerate(short):
        masks[item] |= 1 << place
    full = (1 << len(short)) - 1
    state = full
    for item in long:
        if mask := masks.get(item):
            both = state & mask
            state = ((state + both) | (state - both)) & full
    return (~state & full).bit_count()


def _hashes(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64-bit hash of every 13-gram, in order; 0 where it holds a word without number."""
    if numbers.size < N:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(_mixed(numbers), N)
    hashes: NDArray[np.uint64] = (windows * _FACTORS).sum(axis=1, dtype=np.uint64)
    known = np.lib.stride_tricks.sliding_window_view(numbers, N).all(axis=1)
    return np.where(known, hashes, np.uint64(0))


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread small numbers over 64 bits (the finaliser of MurmurHash3)."""
    mixed = numbers.copy()
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(33))
