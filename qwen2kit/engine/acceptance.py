"""How many tokens to guess, from how many guesses were right (Leviathan et al., arXiv 2211.17192).

If each guessed token is right with probability ``a``, a pass that checks ``k`` of them yields
``E(k) = (1 - a^(k+1)) / (1 - a)`` tokens and takes ``1 + k c`` times as long as one without
(theorem 3.8); more exactly ``1 + s + k c``, as a pass over several tokens is another pass. The
best length maximises the quotient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_MEMORY: Final = 0.9
_PRIOR: Final = (3.0, 4.0)


class Acceptance:
    """What became of one sequence's guesses.

    Args:
        cost: ``c``, time to guess and check one token, in plain decoding steps.
        longest: most tokens ever worth guessing.
        surcharge: ``s``, what any guess costs, in the same unit.
    """

    def __init__(self, cost: float, longest: int, surcharge: float = 0.15) -> None:
        self._cost = cost
        self._surcharge = surcharge
        self._longest = longest
        self._right, self._tried = _PRIOR
        self._guess: tuple[int, ...] = ()
        self._at = 0

    @property
    def rate(self) -> float:
        """Share of tokens that were right where all before them were; older ones count less."""
        return self._right / self._tried

    def observe(self, tokens: Sequence[int]) -> None:
        """Compare the last guess with what was drawn instead."""
        drawn = tokens[self._at : self._at + len(self._guess)]
        pairs = zip(self._guess, drawn, strict=False)
        right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(drawn))
        tried = right + (right < len(drawn))
        if tried:
            self._right = self._right * _MEMORY**tried + right
            self._tried = self._tried * _MEMORY**tried + tried
        self._guess = ()

    def length(self, limit: int) -> int:
        """Tokens worth guessing now, 0 to ``limit``."""
        best, best_gain, expected, power = 0, 1.0, 1.0, 1.0
        for count in range(1, min(limit, self._longest) + 1):
            power *= self.rate
            expected += power
            gain = expected / (1 + self._surcharge + count * self._cost)
            if gain > best_gain:
                best, best_gain = count, gain
        if best == 0:
            self._drift()
        return best

    def remember(self, guess: tuple[int, ...], tokens: Sequence[int]) -> None:
        """Note what is guessed after ``tokens``."""
        self._guess, self._at = guess, len(tokens)

    def _drift(self) -> None:
        """Without guesses nothing is learnt; go back to the first opinion, slowly."""
        self._right = 0.99 * self._right + 0.01 * _PRIOR[0]
        self._tried = 0.99 * self._tried + 0.01 * _PRIOR[1]
