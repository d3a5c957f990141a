"""A model whose next-token logits are a hash of everything before them.

Nothing is like anything else: a token lost, doubled, or fed to the wrong slot changes all that
follows. Quick enough for thousands of random schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.conformance.models import UNTIED
from qwen2kit.backend.protocol import FinishReason
from qwen2kit.backend.slots import BROKEN, Course, Cut, Edit, Feed
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.engine.recompute import RecomputingSlots
from qwen2kit.engine.request import Constraint, Request
from qwen2kit.errors import NonFiniteLogits
from qwen2kit.generate.edit import apply_edit, pack_mask
from qwen2kit.generate.sampling import Drawn, Sampler, Sampling
from qwen2kit.generate.whole_row import draw_from_row

VOCAB = 80
_TABLE = np.random.default_rng(0).standard_normal((1009, VOCAB)).astype(np.float32) * 3


class HashModel:
    """Just enough of a `CompiledModel` to generate; remembers the slots it gave."""

    def __init__(self, limit: int = 96) -> None:
        self.spec = replace(UNTIED, vocab_size=VOCAB)
        self.limit = limit
        self.given: list[WatchedSlots] = []

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        state, rows = 1, []
        for token in tokens:
            state = (state * 31 + token + 7) % 1_000_003
            rows.append(_TABLE[state % 1009] + np.float32(state % 17 / 10) * _TABLE[state % 1007])
        return np.stack(rows)

    def slots(self, count: int, capacity: int) -> WatchedSlots:
        self.given.append(WatchedSlots(self, count, capacity))
        return self.given[-1]


class QuickLogits(HostLogits):
    """Draws by itself, as a GPU does; every other pass gives these."""

    quick = True

    def draw(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> list[int]:
        return [self._one(*given) for given in zip(self.rows(rows), edits, cuts, strict=True)]

    @staticmethod
    def _one(logits: NDArray[np.float32], edit: Edit, cut: Cut) -> int:
        how = Sampling(temperature=edit.temperature, top_k=cut.top_k, top_p=cut.top_p)
        try:
            return draw_from_row(apply_edit(logits, edit)[: edit.limit], how, cut.point)
        except NonFiniteLogits:
            return BROKEN


class WatchedSlots(RecomputingSlots):
    """Counts what is asked of it; what a closed run leaves beyond its end is rubbish."""

    def __init__(self, model: HashModel, count: int, capacity: int) -> None:
        super().__init__(model, count, capacity)  # type: ignore[arg-type]
        self.fed: list[list[Feed]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.runs = self.run_steps = self.run_rows = 0
        self.bounds: list[int | None] = []
        self.running = False
        self.closed = False

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        assert not self.running, "a run is still going on"
        self.fed.append(list(feeds))
        found = super().feed(feeds)
        wanted = range(sum(feed.wanted for feed in feeds))
        return QuickLogits(found.rows(wanted)) if len(self.fed) % 2 else found

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        self.bounds.append(most)
        return self._watched(feeds, super().run_greedy(feeds, limit, most))

    def run_drawn(
        self, feeds: Sequence[Feed], courses: Sequence[Course], most: int | None = None
    ) -> Iterator[list[int]]:
        self.bounds.append(most)
        return self._watched(feeds, islice(self._drawn(feeds, courses), most))

    def _drawn(self, feeds: Sequence[Feed], courses: Sequence[Course]) -> Iterator[list[int]]:
        said = [dict(course.said) for course in courses]
        for step in range(self.capacity):
            if any(feed.start >= self.capacity for feed in feeds):
                return
            rows = self.feed(feeds).rows(range(len(feeds)))
            tokens = []
            for row, course, own in zip(rows, courses, said, strict=True):
                tokens.append(_by(course, own, row, step))
                own[tokens[-1]] = own.get(tokens[-1], 0) + 1
            yield tokens
            feeds = [
                Feed(feed.slot, feed.start + 1, (max(token, 0),))
                for feed, token in zip(feeds, tokens, strict=True)
            ]

    def _watched(self, feeds: Sequence[Feed], run: Iterator[list[int]]) -> Iterator[list[int]]:
        self.runs += 1
        assert not self.running
        try:
            while (ids := next(run, None)) is not None:
                self.fed.pop()
                self.run_steps += 1
                self.run_rows += len(feeds)
                self.running = True
                yield ids
                self.running = False
        finally:
            self.running = False
            for feed in feeds:
                held = self._held[feed.slot]
                held += [0] * (self.capacity - len(held))

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self.running
        assert source != target
        self.copies.append((source, target, length))
        super().copy(source, target, length)

    def close(self) -> None:
        self.closed = True
        super().close()


def _by(course: Course, said: dict[int, int], row: NDArray[np.float32], step: int) -> int:
    """The id that ``course`` draws at a later ``step``."""
    scores = row.copy()
    for token in {*course.heard, *said}:
        value, penalty = scores[token], np.float32(course.repetition_penalty)
        scores[token] = value / penalty if value > 0 else value * penalty
        if token in said:
            less = course.presence_penalty + said[token] * course.frequency_penalty
            scores[token] -= np.float32(less)
    how = Sampling(temperature=course.temperature, top_k=course.top_k, top_p=course.top_p)
    try:
        return draw_from_row(scores[: course.limit], how, course.points(step, 1)[0])
    except NonFiniteLogits:
        return BROKEN


class EveryThird(Constraint):
    """Allows the ids that are ``turn`` modulo 3, only ``turn`` itself every fourth time; ends
    after ``length`` tokens."""

    def __init__(self, turn: int, length: int) -> None:
        self.turn, self.left, self.count = turn, length, 0

    @property
    def finished(self) -> bool:
        return self.left == 0

    def mask(self) -> NDArray[np.uint32] | None:
        assert not self.finished
        allowed = np.arange(VOCAB) % 3 == self.turn
        if self.count % 4 == 3:
            allowed = np.arange(VOCAB) == self.turn
        return None if self.count == 1 else pack_mask(allowed)

    def forced(self) -> tuple[int, ...]:
        return (self.turn,) if self.count % 4 == 3 and not self.finished else ()

    def accept(self, token: int) -> None:
        mask = self.mask()
        assert mask is None or mask[token // 32] >> (token % 32) & 1
        self.turn, self.left, self.count = token % 3, self.left - 1, self.count + 1


def alone(model: HashModel, request: Request, room: int) -> list[tuple[Drawn, FinishReason | None]]:
    """What ``request`` gives by itself: one whole row after the other, no engine."""
    sampler = Sampler(request.sampling, request.prompt, request.stream)
    tokens, found = list(request.prompt), []
    left = min(request.sampling.max_new_tokens, room)
    constraint = request.constraint
    while True:
        edit = sampler.edit(None if constraint is None else constraint.mask())
        drawn = sampler.draw(model.logits(tokens)[-1], edit)
        tokens.append(drawn.token)
        left -= 1
        reason = request.sampling.finish_reason(drawn.token, left)
        if reason != "stop" and constraint is not None:
            constraint.accept(drawn.token)
            reason = "stop" if constraint.finished else reason
        found.append((drawn, reason))
        if reason is not None:
            return found
