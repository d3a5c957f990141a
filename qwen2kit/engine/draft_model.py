"""Guesses by a smaller model of the same tokenizer (Leviathan et al., arXiv 2211.17192).

Sampled guesses are drawn by a fork of the request's own sampler, with the random numbers that the
large model's draws will use: where the two distributions are alike, so are the draws, and what
comes out is still exactly what the large model alone would have said.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Final

from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.slots import BROKEN, Feed
from qwen2kit.engine.acceptance import Acceptance
from qwen2kit.engine.drafting import Unfinished
from qwen2kit.engine.drawing import draw_rows
from qwen2kit.engine.request import Request
from qwen2kit.engine.sequence import Sequence
from qwen2kit.engine.slot_table import SlotTable
from qwen2kit.spec.counts import count_params
from qwen2kit.tokenizer.bpe import Tokenizer

_CHECK_COST: Final = 0.05


@dataclass(slots=True)
class _Draft:
    """One request as the small model sees it.

    Attributes:
        request: what was asked.
        acceptance: how guessing has gone.
        sequence: its place in a slot, once it has one. Shares the request's tokens.
        guess: the last one.
        checked: tokens known to be in the small model's vocabulary.
        broken: the small model's logits were not finite; it is not asked again.
    """

    request: Request
    acceptance: Acceptance
    sequence: Sequence | None = None
    guess: tuple[int, ...] = ()
    checked: int = 0
    broken: bool = False


class DraftModel:
    """A `qwen2kit.engine.drafting.Drafter` that runs a model.

    Requests that are too long for it, or hold ids that it does not know, go on without guesses; so
    does one for which its logits are NaN or infinite.

    Args:
        model: loaded; of the target's tokenizer (`check_same_tokenizer`), its vocabulary may have
            another number of padding rows.
        target: the model whose tokens are guessed.
        slots: requests at a time.
        capacity: longest sequence in tokens.
        longest: most tokens of a guess.
        cost: time to guess and check one token, in steps of the target; None is the quotient of
            the parameters and a little.

    Raises:
        BackendError: not even one slot fits into memory.
    """

    def __init__(
        self,
        model: CompiledModel,
        target: CompiledModel,
        *,
        slots: int,
        capacity: int,
        longest: int = 8,
        cost: float | None = None,
    ) -> None:
        self._slots = model.slots(slots, min(capacity, model.limit))
        self._table = SlotTable(self._slots.count, self._slots.capacity)
        self._known = min(model.spec.vocab_size, target.spec.vocab_size)
        small, large = (count_params(m.spec).activated for m in (model, target))
        self._cost = small / large + _CHECK_COST if cost is None else cost
        self._longest = longest
        self._drafts: dict[int, _Draft] = {}
        self._steps = 0

    def begin(self, key: int, request: Request) -> None:
        """See `Drafter`."""
        self._drafts[key] = _Draft(request, Acceptance(self._cost, self._longest))

    def propose(self, sequences: Many[Unfinished]) -> list[tuple[int, ...]]:
        """See `Drafter`."""
        self._steps += 1
        counts = [self._count(item) for item in sequences]
        asked = [(item, n) for item, n in zip(sequences, counts, strict=True) if n]
        guesses = dict(zip((item.key for item, _ in asked), self._guess(asked), strict=True))
        return [guesses.get(item.key, ()) for item in sequences]

    def forget(self, key: int) -> None:
        """See `Drafter`."""
        draft = self._drafts.pop(key, None)
        if draft is not None and draft.sequence is not None:
            self._table.leave(draft.sequence, self._steps)

    def _give_up(self, draft: _Draft) -> None:
        """Ask no more about a request, and leave nothing in its slot that others could feel."""
        sequence, draft.sequence, draft.broken = draft.sequence, None, True
        if sequence is not None:
            self._table.leave(sequence, self._steps)
            self._table.put(sequence.slot, (), self._steps)
            self._slots.clear(sequence.slot)

    def close(self) -> None:
        """See `Drafter`."""
        self._drafts.clear()
        self._slots.close()

    def _count(self, item: Unfinished) -> int:
        """How many tokens to guess now; a request that is worth it gets a slot."""
        draft = self._drafts[item.key]
        if draft.broken:
            return 0
        draft.acceptance.observe(item.tokens)
        self._catch_up(draft, item.tokens)
        count = min(draft.acceptance.length(item.limit), self._slots.capacity - len(item.tokens))
        if count < 1 or not self._knows(draft, item.tokens):
            return 0
        return count if draft.sequence is not None or self._seat(draft, item) else 0

    def _catch_up(self, draft: _Draft, tokens: Many[int]) -> None:
        """What was right of the last guess is in the slot already, its last token excepted."""
        if draft.sequence is None:
            return
        fed = draft.sequence.fed
        for token in draft.guess[:-1]:
            if fed >= len(tokens) or tokens[fed] != token:
                break
            fed += 1
        draft.sequence.fed = min(fed, len(tokens) - 1)
        draft.guess = ()

    def _knows(self, draft: _Draft, tokens: Many[int]) -> bool:
        biased = (token for token, _ in draft.request.sampling.logit_bias)
        new = tokens[draft.checked :]
        if max(max(new, default=0), max(biased, default=0)) >= self._known:
            return False
        draft.checked = len(tokens)
        return True

    def _seat(self, draft: _Draft, item: Unfinished) -> bool:
        tokens = item.tokens if isinstance(item.tokens, list) else list(item.tokens)
        place = self._table.find(tokens) if self._table.free else None
        if place is None:
            return False
        if place.source != place.slot:
            self._slots.copy(place.source, place.slot, place.keep)
        draft.sequence = Sequence(item.key, draft.request, tokens, 0, item.sampler, plain=False)
        self._table.take(place, draft.sequence)
        return True

    def _guess(self, asked: Many[tuple[Unfinished, int]]) -> list[tuple[int, ...]]:
        """Guesses of these lengths; cut where an id is none of the target's."""
        if not asked:
            return []
        samplings = [self._drafts[item.key].request.sampling for item, _ in asked]
        limits = {sampling.vocab_limit for sampling in samplings}
        if len(limits) == 1 and all(sampling.is_plain_greedy for sampling in samplings):
            drawn = self._greedy(asked, limits.pop())
        else:
            drawn = self._sampled(asked)
        guesses = []
        for (item, count), tokens in zip(asked, drawn, strict=True):
            draft = self._drafts[item.key]
            foreign = (i for i, token in enumerate(tokens[:count]) if not self._is_known(token))
            draft.guess = tuple(tokens[: next(foreign, count)])
            draft.acceptance.remember(draft.guess, item.tokens)
            guesses.append(draft.guess)
            if BROKEN in tokens[:count]:
                self._give_up(draft)
        return guesses

    def _greedy(self, asked: Many[tuple[Unfinished, int]], limit: int | None) -> list[list[int]]:
        feeds = self._unfed([item for item, _ in asked])
        first = self._slots.feed(feeds).greedy(limit)
        drawn = [[token] for token in first]
        more = max(count for _, count in asked) - 1
        if more and all(_end(feed) < self._slots.capacity for feed in feeds):
            feeds = [_next(feed, max(token, 0)) for feed, token in zip(feeds, first, strict=True)]
            steps = self._slots.run_greedy(feeds, limit, more)
            for ids in steps:
                for tokens, token in zip(drawn, ids, strict=True):
                    tokens.append(token)
        return drawn

    def _sampled(self, asked: Many[tuple[Unfinished, int]]) -> list[list[int]]:
        samplers = [item.sampler.fork() for item, _ in asked]
        drawn: list[list[int]] = [[] for _ in asked]
        feeds = self._unfed([item for item, _ in asked])
        going = list(range(len(asked)))
        while going:
            logits = self._slots.feed([feeds[i] for i in going])
            found = draw_rows(logits, [samplers[i] for i in going])
            for i, (token, *_) in zip(going, found, strict=True):
                drawn[i].append(token)
                feeds[i] = _next(feeds[i], token)
            going = [
                i for i in going if len(drawn[i]) < asked[i][1] and self._is_known(drawn[i][-1])
            ]
        return drawn

    def _is_known(self, token: int) -> bool:
        """Whether both models know it; a broken row gave none."""
        return 0 <= token < self._known

    def _unfed(self, items: Many[Unfinished]) -> list[Feed]:
        """What the small model has not read yet of each sequence: one token at least."""
        feeds = []
        for item in items:
            sequence = self._drafts[item.key].sequence
            assert sequence is not None
            tokens = tuple(item.tokens[sequence.fed :])
            feeds.append(Feed(sequence.slot, sequence.fed, tokens))
            sequence.fed = len(item.tokens)
        return feeds


def check_same_tokenizer(draft: Tokenizer, target: Tokenizer) -> None:
    """Refuse a draft model whose ids mean something else.

    Raises:
        ConfigError: the tokenizers differ.
    """
    from qwen2kit.errors import ConfigError

    if draft.fingerprint != target.fingerprint:
        raise ConfigError(
            "the draft model's tokenizer is not the model's; take a smaller model of the same "
            "release, e.g. Qwen2.5-0.5B for Qwen2.5-7B"
        )


def _end(feed: Feed) -> int:
    return feed.start + len(feed.tokens)


def _next(feed: Feed, token: int) -> Feed:
    """One more token after ``feed``."""
    return Feed(feed.slot, _end(feed), (token,))
