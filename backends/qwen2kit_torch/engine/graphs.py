"""Slots on CUDA: few tokens go through a captured step, many through passes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from qwen2kit.backend.slots import Course, Cut, DrawingLogits, Edit, Feed
from qwen2kit_torch.engine.captured_passes import CapturedPasses
from qwen2kit_torch.engine.captures import Captures, run_aside
from qwen2kit_torch.engine.device_logits import logits_on_device
from qwen2kit_torch.engine.draw_tail import DrawTail
from qwen2kit_torch.engine.draws import Scratch
from qwen2kit_torch.engine.eager import EagerSlots
from qwen2kit_torch.engine.joined import JoinedWeights
from qwen2kit_torch.engine.logits import DeviceLogits
from qwen2kit_torch.engine.memory import bounded_by_memory
from qwen2kit_torch.engine.pieces import TOKENS_PER_PASS, passes
from qwen2kit_torch.engine.prompts import PassSize, PromptPass, rows_of
from qwen2kit_torch.engine.sending import send, sent
from qwen2kit_torch.engine.step import HISTORY, Step
from qwen2kit_torch.engine.tuning import power_of_two
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.rope import Rope

# Feeds of more tokens than this go through a pass of their own, unless all of them are few.
_LONG = 8
_FEW = 64
_MOST_ROWS = 256
# Steps under way while the caller looks at an earlier one.
_AHEAD = 4


class GraphSlots(EagerSlots):
    """Implements `qwen2kit.backend.slots.PersistentSlots`.

    Args:
        model: loaded, on a CUDA device.
        weights: its joined weights.
        count: slots asked for.
        capacity: tokens of each.

    Raises:
        BackendError: not even one slot fits into memory.
    """

    def __init__(self, model: Qwen2, weights: JoinedWeights, *, count: int, capacity: int) -> None:
        super().__init__(model, count=count, capacity=capacity)
        self._weights = weights
        self._captures = Captures()
        self._steps: dict[tuple[int, bool], CapturedStep] = {}
        self._passes = CapturedPasses(
            model.spec, weights, self._storage, self._rope(), self._captures
        )
        self._scratch: Scratch | None = None

    def prepare(self) -> None:
        """Capture steps and passes of all sizes, compile what draws."""
        with torch.inference_mode(), torch.cuda.device(self._device):
            for rows in _buckets(max(self.count, _FEW)):
                self._step(rows)
            for rows in _buckets(self.count):
                self._step(rows, draws=True)
            self._passes.prepare()
        logits = self.feed([Feed(0, 0, (0,) * min(self.capacity, _FEW + 1))])
        if isinstance(logits, DrawingLogits):
            changed = Edit(temperature=1.0, ids=np.array([0]), shift=np.ones(1, np.float32))
            for edit, cut in product((Edit(temperature=1.0), changed), (Cut(), Cut(top_k=1))):
                logits.draw([0], [edit], [cut])

    @bounded_by_memory
    @torch.inference_mode()
    def feed(self, feeds: Sequence[Feed]) -> DeviceLogits:
        """Append tokens to slots; see the protocol."""
        long, short = _divided(feeds)
        found: dict[int, Tensor] = {}
        with torch.cuda.device(self._device):
            together = self._passes.run(feeds, long, short) if long else None
            if together is not None:
                return logits_on_device(together)
            parts = [self._long(feeds, long), self._short(feeds, short)]
        for indices, part in zip((long, short), parts, strict=True):
            sizes = [feeds[index].wanted for index in indices]
            found |= dict(zip(indices, torch.split(part, sizes), strict=True))
        if not (long and short):
            return logits_on_device(parts[0] if long else parts[1])
        return logits_on_device(torch.cat([found[index] for index in range(len(feeds))]))

    def _long(self, feeds: Sequence[Feed], indices: Sequence[int]) -> Tensor:
        """Logits ``[N, V]`` of feeds that go through passes of their own."""
        parts = [self._weights.head.new_empty(0, self._model.spec.vocab_size)]
        for pieces in passes([feeds[index] for index in indices], TOKENS_PER_PASS):
            size = PassSize(
                rows=sum(len(piece.tokens) for piece in pieces),
                pieces=len(pieces),
                singles=0,
                wanted=sum(piece.wanted for piece in pieces),
            )
            step = PromptPass(self._model.spec, self._weights, self._storage, self._rope(), size)
            step.set(pieces)
            step.run()
            parts.append(step.logits)
        return torch.cat(parts)

    def _short(self, feeds: Sequence[Feed], indices: Sequence[int]) -> Tensor:
        """Logits ``[N, V]`` of feeds that go through one captured step."""
        chosen = [feeds[index] for index in indices]
        if not chosen:
            return self._weights.head.new_empty(0, self._model.spec.vocab_size)
        step = self._step(sum(len(feed.tokens) for feed in chosen))
        step.set_rows(chosen)
        step.replay()
        wanted: list[int] = []
        done = 0
        for feed in chosen:
            done += len(feed.tokens)
            wanted += range(done - feed.wanted, done)
        return step.logits(wanted)

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        """Feed one token per slot and go on with the most likely ids; see the protocol."""
        if len(feeds) > _MOST_ROWS:
            yield from super().run_greedy(feeds, limit, most)
            return
        with torch.inference_mode(), torch.cuda.device(self._device):
            step = self._step(len(feeds))
            step.set_rows(feeds, limit)
        yield from self._run(step, feeds, most)

    def run_drawn(
        self, feeds: Sequence[Feed], courses: Sequence[Course], most: int | None = None
    ) -> Iterator[list[int]]:
        """Feed one token per slot and go on with drawn ids; see `DrawingSlots`."""
        if len(feeds) > _MOST_ROWS:
            return  # an end, as when slots are full: the caller goes on by itself
        with torch.inference_mode(), torch.cuda.device(self._device):
            step = self._step(len(feeds), draws=True)
            step.set_rows(feeds)
            step.tail.set(courses)
        yield from self._run(step, feeds, most)

    def _run(
        self, step: CapturedStep, feeds: Sequence[Feed], most: int | None
    ) -> Iterator[list[int]]:
        """Let the device go on, some steps ahead of the reader."""
        room = self.capacity - max(feed.start for feed in feeds)
        room = room if most is None else min(room, most)
        launched = 0
        for done in range(room):
            with torch.inference_mode(), torch.cuda.device(self._device):
                while launched < min(room, done + _AHEAD):
                    step.replay_and_report(launched, room)
                    launched += 1
            yield step.reported(done)[: len(feeds)]

    def close(self) -> None:
        """Give the memory back."""
        super().close()
        self._steps.clear()
        self._passes.close()

    @bounded_by_memory
    def _step(self, rows: int, *, draws: bool = False) -> CapturedStep:
        bucket = power_of_two(rows)
        step = self._steps.get((bucket, draws))
        if step is None:
            early = torch.version.hip is None
            early = early and torch.cuda.get_device_capability(self._device) >= (9, 0)
            plain = Step(
                self._model.spec,
                self._weights,
                self._storage,
                bucket,
                self._rope(),
                early=early,
                scratch=self._drawing_scratch() if draws else None,
            )
            step = self._steps[bucket, draws] = CapturedStep(plain, bucket, self._captures)
        return step

    def _drawing_scratch(self) -> Scratch:
        if self._scratch is None:
            vocab = self._model.spec.vocab_size
            self._scratch = Scratch(_buckets(self.count)[-1], vocab, self._device, said=True)
        return self._scratch

    def _rope(self) -> Rope:
        return self._model.rope(self.capacity, self._device, self._weights.norm.dtype)


def _buckets(rows: int) -> list[int]:
    """Sizes of captured steps, up to that for so many rows."""
    most = power_of_two(min(_MOST_ROWS, rows))
    return [1 << exponent for exponent in range(most.bit_length())]


def _divided(feeds: Sequence[Feed]) -> tuple[list[int], list[int]]:
    """Which feeds go through passes of their own, and which through a captured step."""
    everything = list(range(len(feeds)))
    if sum(len(feed.tokens) for feed in feeds) <= _FEW:
        return [], everything
    short = [index for index in everything if len(feeds[index].tokens) <= _LONG]
    if sum(len(feeds[index].tokens) for index in short) > _MOST_ROWS:
        return everything, []
    return [index for index in everything if len(feeds[index].tokens) > _LONG], short


class CapturedStep:
    """A `Step` as a CUDA graph, and the way of its ids to the host.

    Args:
        step: not yet run.
        count: its rows.
        captures: makes the graph.
    """

    def __init__(self, step: Step, count: int, captures: Captures) -> None:
        self._step, self._count = step, count
        run_aside(step.run)  # compiles, and stores nothing: all slots are negative
        self.graph = captures(step.run)
        self._copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._ids = torch.empty(HISTORY, count, dtype=torch.int32, pin_memory=True)
        self._events = [(_event(), _event()) for _ in range(HISTORY)]

    def set_rows(self, feeds: Sequence[Feed], limit: int | None = None) -> None:
        """Tokens, slots and positions of the next step; its number becomes 0."""
        rows = np.zeros((3, self._count), dtype=np.int32)
        rows[1] = -1
        given = rows_of(feeds)
        rows[:, : given.shape[1]] = given
        step = self._step
        send(rows, step.rows)
        step.count.zero_()
        step.limit.fill_(step.logits.shape[1] if limit is None else limit)

    @property
    def tail(self) -> DrawTail:
        """That of a step that draws."""
        assert self._step.tail is not None
        return self._step.tail

    def replay(self) -> None:
        """Queue the step."""
        self.graph.replay()

    def logits(self, rows: Sequence[int]) -> Tensor:
        """A copy of the logits ``[len(rows), V]`` of some rows."""
        if list(rows) == list(range(len(rows))):
            return self._step.logits[: len(rows)].clone()
        return self._step.logits[sent(rows, self._step.logits.device)]

    def replay_and_report(self, number: int, last: int) -> None:
        """Queue step ``number`` of ``last``, and the copy of its ids on a stream of its own."""
        place = number % HISTORY
        computed, copied = self._events[place]
        if place == 0 and self._step.tail is not None:
            self._step.tail.set_points(number, last - number)
        self.graph.replay()
        computed.record()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(computed)
            self._ids[place].copy_(self._step.history[place], non_blocking=True)
            copied.record()

    def reported(self, number: int) -> list[int]:
        """Ids that step ``number`` chose, when it is done."""
        place = number % HISTORY
        self._events[place][1].synchronize()
        found: list[int] = self._ids[place].tolist()
        return found


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
