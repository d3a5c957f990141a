"""Log-probabilities of prompts' own tokens, as ``echo`` with ``logprobs`` asks for them.

They wait for the engine's slots and are computed there, piece by piece between its steps, as a full
softmax over every row of the head: what `CompiledModel.score` computes. A pass takes as many
prompts as fit into a piece. A beginning that was scored lately is not computed again: questions
behind the same examples, or answers to one question, cost their own tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qwen2kit.backend.slots import Edit, Feed, Shortlist
from qwen2kit.common_prefix import common_prefix
from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import BackendError
from qwen2kit.serve.errors import ApiError, invalid, no_memory, non_finite
from qwen2kit.serve.score_memory import PromptScores, ScoreMemory, TokenScore

_WORTH_WAITING: Final = 8
"""Tokens in common from which on a prompt waits for the scores of another one."""
_FIRST: Final = np.float32(1e9)
"""Added to the logit of the prompt's own token: puts it first in the shortlist of its row."""


@dataclass(slots=True, eq=False)
class Scoring:
    """A prompt that is being scored.

    Attributes:
        prompt: token ids.
        top: likeliest tokens wanted per position.
        answer: where the scores go.
        slot: the engine's that was borrowed for it, if it has one now.
        fed: positions that the slot holds.
        scores: those so far; may be ahead of ``fed``.
        after: it waits until that one, which begins alike, has its scores.
        cancelled: nobody waits for it.
    """

    prompt: tuple[int, ...]
    top: int
    answer: asyncio.Future[PromptScores]
    slot: int | None = None
    fed: int = 0
    scores: PromptScores = field(default_factory=list)
    after: Scoring | None = None
    cancelled: bool = False

    @property
    def done(self) -> bool:
        """Whether every token but the first has its score."""
        return len(self.scores) == len(self.prompt) - 1


Turn = tuple[Scoring, Feed]
Ended = tuple[Scoring, PromptScores | ApiError]


class PromptScorer:
    """Scores prompts in slots of the engine's; belongs to the engine's thread.

    Args:
        engine: its slots are borrowed.
        piece: tokens computed at a time.
    """

    def __init__(self, engine: TextEngine, piece: int = 256) -> None:
        self._engine = engine
        self._piece = piece
        self._memory = ScoreMemory()

    def advance(self, scorings: Sequence[Scoring]) -> list[Ended]:
        """Compute one more piece, the oldest first; those that have ended with all their scores,
        or with why there are none. Where no slot is free, they wait."""
        ended: list[Ended] = []
        turns: list[Turn] = []
        left, full = self._piece, False
        for scoring in scorings:
            if not left:
                break
            if scoring.slot is None and (full or self._begins_like_one_of(turns, scoring)):
                continue
            try:
                seated = self._seat(scoring)
            except BackendError as error:
                ended.append((scoring, invalid(str(error))))
                continue
            if not seated:
                full = True  # those that have a slot go on
            elif scoring.done:
                ended.append((scoring, scoring.scores))
            else:
                turns.append((scoring, _feed(scoring, left)))
                left -= len(turns[-1][1].tokens)
        return ended + self._run(turns)

    def drop(self, scoring: Scoring, *, sound: bool = True) -> None:
        """Give the slot back, if it has one; what was computed in it stays of use if ``sound``."""
        if scoring.slot is not None:
            done = scoring.prompt[: scoring.fed]
            self._engine.engine.take_back(scoring.slot, done, sound=sound)
            scoring.slot = None

    def _begins_like_one_of(self, turns: Sequence[Turn], scoring: Scoring) -> bool:
        """Whether to wait: another one computes what this one begins with."""
        if scoring.after is not None and scoring.after.slot is not None:
            return True
        scoring.scores = self._memory.recall(scoring.prompt, scoring.top)
        known = len(scoring.scores) + _WORTH_WAITING
        found = (other for other, _ in turns if common_prefix(scoring.prompt, other.prompt) > known)
        scoring.after = next(found, None)
        return scoring.after is not None

    def _seat(self, scoring: Scoring) -> bool:
        """Whether it has a slot now, or needs none. Raises BackendError if none could hold it."""
        if scoring.slot is None and not scoring.done:
            place = self._engine.engine.lend(scoring.prompt, most=len(scoring.scores))
            if place is not None:
                scoring.slot, scoring.fed = place.slot, place.keep
        return scoring.done or scoring.slot is not None

    def _run(self, turns: Sequence[Turn]) -> list[Ended]:
        """One pass; those that end with it."""
        try:
            found = self._shortlist(turns)
        except BackendError:
            for scoring, _ in turns:
                self.drop(scoring, sound=False)
            return [(scoring, no_memory()) for scoring, _ in turns]
        ended: list[Ended] = []
        row = 0
        for scoring, feed in turns:
            rows = slice(row, row + feed.wanted)
            row = rows.stop
            scoring.fed += len(feed.tokens)
            if found is not None and not all(found.sound[rows]):
                self.drop(scoring, sound=False)
                ended.append((scoring, non_finite()))
                continue
            if found is not None:
                scoring.scores += _scores(found, rows, _targets(scoring, feed), scoring.top)
            if scoring.done:
                self.drop(scoring)
                self._memory.keep(scoring.prompt, scoring.top, scoring.scores)
                ended.append((scoring, scoring.scores))
        return ended

    def _shortlist(self, turns: Sequence[Turn]) -> Shortlist | None:
        """Of all rows that are wanted, if any are. Raises BackendError if memory is short."""
        if not turns:
            return None
        logits = self._engine.engine.feed_lent([feed for _, feed in turns])
        targets = [target for turn in turns for target in _targets(*turn)]
        if not targets:
            return None
        size = min(
            max(scoring.top for scoring, _ in turns) + 1, self._engine.engine.spec.vocab_size
        )
        return logits.shortlist(size, [_favour(target) for target in targets])


def _feed(scoring: Scoring, most: int) -> Feed:
    """The next positions, and the logits of those that have no score yet."""
    assert scoring.slot is not None
    end = min(scoring.fed + most, len(scoring.prompt) - 1)
    tokens = scoring.prompt[scoring.fed : end]
    return Feed(scoring.slot, scoring.fed, tokens, wanted=max(0, end - len(scoring.scores)))


def _targets(scoring: Scoring, feed: Feed) -> tuple[int, ...]:
    """The tokens that the wanted logits are to be asked about."""
    end = feed.start + len(feed.tokens) + 1
    return scoring.prompt[end - feed.wanted : end]


def _favour(target: int) -> Edit:
    return Edit(ids=np.array([target]), shift=np.array([_FIRST]))


def _scores(
    found: Shortlist, rows: slice, targets: Sequence[int], top: int
) -> Iterator[TokenScore]:
    logprobs = found.raw[rows].astype(np.float64) - found.raw_total[rows, None]
    for target, ids, values in zip(targets, found.ids[rows], logprobs.tolist(), strict=True):
        likeliest = sorted(
            zip(ids.tolist(), values, strict=True), key=lambda pair: (-pair[1], pair[0])
        )
        yield TokenScore(target, values[0], tuple(likeliest[:top]))
