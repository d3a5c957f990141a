"""Log-probabilities of a prompt's own tokens, as ``echo`` with ``logprobs`` asks for them.

They come from one slot of their own, piece by piece between the engine's steps, as a full softmax
over every row of the head: what `CompiledModel.score` computes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qwen2kit.backend.limits import check_tokens
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.slots import Edit, Feed, Slots
from qwen2kit.errors import NonFiniteLogits

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
        fed: positions computed so far.
        scores: those so far.
        cancelled: nobody waits for it.
    """

    prompt: tuple[int, ...]
    top: int
    answer: asyncio.Future[PromptScores]
    fed: int = 0
    scores: PromptScores = field(default_factory=list)
    cancelled: bool = False


class PromptScorer:
    """Scores one prompt at a time; belongs to the engine's thread.

    The slot is taken when the first prompt comes and kept.

    Args:
        model: loaded.
        capacity: longest prompt in tokens.
        piece: tokens computed at a time.
    """

    def __init__(self, model: CompiledModel, capacity: int, piece: int = 256) -> None:
        self._model = model
        self._capacity = capacity
        self._piece = piece
        self._slots: Slots | None = None

    def advance(self, scoring: Scoring) -> PromptScores | None:
        """Compute one more piece; all scores if that was the last.

        Raises:
            BackendError: the prompt is too long or holds foreign ids, or no memory is left.
            NonFiniteLogits: the model produced no numbers.
        """
        if scoring.fed == 0:
            check_tokens(scoring.prompt, self._model.spec, self._capacity, "the prompt")
        if self._slots is None:
            self._slots = self._model.slots(1, self._capacity)
        prompt, start = scoring.prompt, scoring.fed
        targets = prompt[start + 1 : start + 1 + self._piece]
        if targets:
            tokens = prompt[start : start + len(targets)]
            logits = self._slots.feed([Feed(0, start, tokens, wanted=len(tokens))])
            edits = [_favour(target) for target in targets]
            size = min(scoring.top + 1, self._model.spec.vocab_size)
            found = logits.shortlist(size, edits)
            if not all(found.sound):
                self._slots.clear(0)
                raise NonFiniteLogits
            rows = zip(targets, found.ids, found.raw, found.raw_total, strict=True)
            scoring.scores += [_score(*row, top=scoring.top) for row in rows]
            scoring.fed += len(targets)
        return scoring.scores if scoring.fed >= len(prompt) - 1 else None

    def close(self) -> None:
        """Give the slot back."""
        if self._slots is not None:
            self._slots.close()
            self._slots = None


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
