"""A shuffle that is computed, not stored: a keyed permutation of ``[0, size)`` by random access.

A Feistel network over a grid of ``side * side`` numbers, ``side = ceil(sqrt(size))``; the few
results outside ``[0, size)`` are sent through again until they fall inside (cycle walking). Both
are from Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

from __future__ import annotations

from hashlib import sha512
from math import isqrt

_ROUNDS = 6  # Luby and Rackoff need four; two more for grids too small for their bound
_MASK = 2**64 - 1


class KeyedPermutation:
    """A permutation of ``range(size)`` that depends on ``size`` and ``key`` only.

    Args:
        size: number of items, at least 1.
        key: any text; other keys give unrelated permutations.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._side = isqrt(size - 1) + 1
        digest = sha512(key.encode()).digest()
        self._keys = [
            int.from_bytes(digest[8 * round : 8 * round + 8], "little") for round in range(_ROUNDS)
        ]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        """The item at ``index``. Raises IndexError outside ``[0, size)``."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        item = self._encipher(index)
        while item >= self.size:
            item = self._encipher(item)
        return item

    def _encipher(self, item: int) -> int:
        side = self._side
        left, right = divmod(item, side)
        for key in self._keys:
            left, right = right, (left + _mix(right ^ key)) % side
        return left * side + right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on all bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
