"""Scores of the prompts that were scored last, for those that begin alike."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from qwen2kit.common_prefix import common_prefix

_MOST_PROMPTS: Final = 64
_MOST_PAIRS: Final = 1 << 17
"""Log-probabilities kept: some 16 MB."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token: natural-log probability, and the most likely ids in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


PromptScores = list[TokenScore]
"""Of every token but the first, which nothing precedes."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A prompt and its scores, each with so many likeliest tokens."""

    prompt: tuple[int, ...]
    top: int
    scores: PromptScores

    @property
    def pairs(self) -> int:
        return len(self.scores) * (self.top + 1)


class ScoreMemory:
    """The newest scores, within a bound on memory."""

    def __init__(self) -> None:
        self._known: deque[_Known] = deque()
        self._pairs = 0

    def keep(self, prompt: tuple[int, ...], top: int, scores: PromptScores) -> None:
        """Remember ``scores``, which nobody changes any more; the oldest ones are forgotten."""
        self._known.append(_Known(prompt, top, scores))
        self._pairs += self._known[-1].pairs
        while self._pairs > _MOST_PAIRS or len(self._known) > _MOST_PROMPTS:
            self._pairs -= self._known.popleft().pairs

    def recall(self, prompt: tuple[int, ...], top: int) -> PromptScores:
        """Scores of as much of the beginning of ``prompt`` as is known, a new list."""
        best, most = None, 1
        for known in self._known:
            common = common_prefix(prompt, known.prompt) if known.top >= top else 0
            if common > most:
                best, most = known, common
        if best is None:
            return []
        scores = best.scores[: most - 1]
        if best.top == top:
            return scores
        return [TokenScore(score.token, score.logprob, score.top[:top]) for score in scores]
