"""Log-probabilities of a prompt's own tokens, as ``echo`` with ``logprobs`` asks for them.

They wait for one of the engine's slots and are computed there, piece by piece between its steps, as
a full softmax over every row of the head: what `CompiledModel.score` computes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qwen2kit.backend.slots import Edit, Feed
from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import BackendError, NonFiniteLogits
from qwen2kit.serve.errors import ApiError, invalid, no_memory, non_finite

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIRST = np.float32(1e9)
"""Added to the logit of the prompt's own token: puts it first in the shortlist of its row."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token: natural-log probability, and the most likely ids in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


PromptScores = list[TokenScore]
"""Of every token but the first, which nothing precedes."""


@dataclass(slots=True, eq=False)
class Scoring:
    """A prompt that is being scored.

    Attributes:
        prompt: token ids.
        top: likeliest tokens wanted per position.
        answer: where the scores go.
        slot: the engine's that was borrowed for it, if it has one now.
        fed: positions computed so far.
        scores: those so far.
        cancelled: nobody waits for it.
    """

    prompt: tuple[int, ...]
    top: int
    answer: asyncio.Future[PromptScores]
    slot: int | None = None
    fed: int = 0
    scores: PromptScores = field(default_factory=list)
    cancelled: bool = False


class PromptScorer:
    """Scores one prompt at a time in a slot of the engine's; belongs to the engine's thread.

    Args:
        engine: its slots are borrowed.
        piece: tokens computed at a time.
    """

    def __init__(self, engine: TextEngine, piece: int = 256) -> None:
        self._engine = engine
        self._piece = piece

    def advance(self, scoring: Scoring) -> PromptScores | ApiError | None:
        """Compute one more piece: all scores if that was the last, why there are none, or None if
        it goes on. Before the first piece it waits for a slot."""
        if scoring.slot is None:
            try:
                scoring.slot = self._engine.engine.lend(scoring.prompt)
            except BackendError as error:
                return invalid(str(error))
            if scoring.slot is None:
                return None
        try:
            self._feed(scoring, scoring.slot)
        except NonFiniteLogits:
            self.drop(scoring, sound=False)
            return non_finite()
        except BackendError:
            self.drop(scoring, sound=False)
            return no_memory()
        if scoring.fed < len(scoring.prompt) - 1:
            return None
        self.drop(scoring)
        return scoring.scores

    def drop(self, scoring: Scoring, *, sound: bool = True) -> None:
        """Give the slot back, if it has one; what was computed in it stays of use if ``sound``."""
        if scoring.slot is not None:
            done = scoring.prompt[: scoring.fed]
            self._engine.engine.take_back(scoring.slot, done, sound=sound)
            scoring.slot = None

    def _feed(self, scoring: Scoring, slot: int) -> None:
        prompt, start = scoring.prompt, scoring.fed
        targets = prompt[start + 1 : start + 1 + self._piece]
        if not targets:
            return
        engine = self._engine.engine
        tokens = prompt[start : start + len(targets)]
        logits = engine.feed_lent(Feed(slot, start, tokens, wanted=len(tokens)))
        size = min(scoring.top + 1, engine.spec.vocab_size)
        found = logits.shortlist(size, [_favour(target) for target in targets])
        if not all(found.sound):
            raise NonFiniteLogits
        rows = zip(targets, found.ids, found.raw, found.raw_total, strict=True)
        scoring.scores += [_score(*row, top=scoring.top) for row in rows]
        scoring.fed += len(targets)


def _favour(target: int) -> Edit:
    return Edit(ids=np.array([target]), shift=np.array([_FIRST]))


def _score(
    target: int,
    ids: NDArray[np.int64],
    raw: NDArray[np.float32],
    total: np.float64,
    *,
    top: int,
) -> TokenScore:
    logprobs = raw.astype(np.float64) - total
    pairs = [(int(i), float(p)) for i, p in zip(ids, logprobs, strict=True)]
    own = pairs[0][1]
    likeliest = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:top]
    return TokenScore(target, own, tuple(likeliest))
