"""Continuous batching over a model's slots.

Requests are admitted as slots get free, their prompts read in pieces between the steps of those
that already speak (Orca, OSDI 2022; Sarathi-Serve, arXiv 2403.02310). A slot keeps its tokens when
its request has ended: a later prompt that begins alike builds upon them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from itertools import islice

from qwen2kit.backend.limits import check_tokens
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.slots import BROKEN, Feed, Logits, PersistentSlots, PreparedSlots
from qwen2kit.backend.values import FinishReason, TokenEvent
from qwen2kit.engine.batching import compose
from qwen2kit.engine.drafting import Drafter, Unfinished
from qwen2kit.engine.drawing import Block, draw
from qwen2kit.engine.jump_ahead import JumpAhead
from qwen2kit.engine.request import Request
from qwen2kit.engine.run_ahead import RunAhead, can_run_ahead
from qwen2kit.engine.sequence import Sequence, start
from qwen2kit.engine.slot_table import Place, SlotTable
from qwen2kit.engine.stats import EngineStats
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.generate.sampling import Drawn
from qwen2kit.weights.tensor import HostTensor

_MOST_PASSED_OVER = 8
_CALM = 8
_BURST = 8


class Engine:
    """Continues requests together, each as if it were alone. Not thread-safe.

    Args:
        model: loaded.
        slots: most requests running at a time; the model may offer fewer.
        capacity: longest sequence in tokens, prompt included.
        prefill_tokens: most prompt tokens read in one step, so that running requests go on.
        drafter: guesses tokens ahead; the engine closes it. What a grammar forces is taken several
            tokens at a time without one.

    Attributes:
        spec: the model's.
        capacity: as given.
        stats: counts since it was made.

    Raises:
        BackendError: not even one slot of ``capacity`` tokens is possible.
    """

    def __init__(
        self,
        model: CompiledModel,
        *,
        slots: int,
        capacity: int,
        prefill_tokens: int = 2048,
        drafter: Drafter | None = None,
    ) -> None:
        if prefill_tokens < 1:
            raise ConfigError(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        self.stats = EngineStats()
        self.capacity = capacity
        self.spec = model.spec
        self._prefill = prefill_tokens
        self.speculates = drafter is not None
        self._drafter = JumpAhead(drafter)
        self._slots = model.slots(slots, capacity)
        self._table = SlotTable(self._slots.count, capacity)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._spoilt: set[int] = set()
        self._ahead: RunAhead | None = None
        self._last_key = -1
        self._last_end = -_CALM

    @property
    def slots(self) -> int:
        """Most requests that run at a time."""
        return self._slots.count

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    def prepare(self) -> None:
        """Compile now what the first requests would wait for. To be called before `submit`."""
        if isinstance(self._slots, PreparedSlots):
            self._slots.prepare()

    def submit(self, request: Request) -> int:
        """Queue a request; returns its key, which the events carry as ``prompt``.

        Raises:
            BackendError: the prompt is empty, longer than a slot, or it or a bias names a token
                id outside the vocabulary.
        """
        check_tokens(request.prompt, self.spec, self.capacity, "the prompt")
        biased = max((token for token, _ in request.sampling.logit_bias), default=0)
        if biased >= self.spec.vocab_size:
            raise BackendError(
                f"logit_bias holds token id {biased}, outside the vocabulary of "
                f"{self.spec.vocab_size}"
            )
        self._last_key += 1
        self._waiting.append(start(self._last_key, request, self.capacity))
        return self._last_key

    def cancel(self, key: int) -> None:
        """Forget a request; no event follows. Unknown and finished keys are ignored."""
        if key in self._running:
            self._release(self._running[key])
            if self._ahead is not None and not self._ahead.worthwhile:
                self._stop_running_ahead()
        else:
            self._waiting = deque(item for item in self._waiting if item.key != key)

    def step(self) -> list[TokenEvent]:
        """Admit what fits, read some prompt, draw a token for every request that is ready.

        A request whose logits are NaN or infinite ends with ``error``, alone. An exception that
        leaves this makes the engine unfit for anything but `close`.
        """
        if self._ahead is None or not self._ahead.ends:
            self._admit()
        if not self._running:
            return []
        self.stats.steps += 1
        events = None
        if self._ahead is not None:
            events = self._follow_ahead()
            if events is None:
                self._admit()
        if events is None:
            self._run_ahead()
            events = self._follow_ahead()
        return self._advance() if events is None else events

    def export(self, tokens: Tokens[int]) -> tuple[int, Iterator[tuple[str, HostTensor]]]:
        """How many of the first ``tokens`` some slot holds, and their keys and values as
        `PersistentSlots.export` gives them. To be read before the next `step`.

        Raises:
            BackendError: slots of this backend cannot be saved.
        """
        self._stop_running_ahead()
        slot, length = self._table.longest(tokens)
        return length, self._persistent().export(slot, length)

    def restore(self, tokens: Tokens[int], tensors: Iterator[tuple[str, HostTensor]]) -> None:
        """Put back what `export` gave for ``tokens``; prompts that begin with them build upon it.

        Raises:
            BackendError: slots of this backend cannot be saved, all are taken, or the tokens do
                not fit.
            WeightError: the tensors do not fit.
        """
        check_tokens(tokens, self.spec, self.capacity, "the saved prompt")
        slots = self._persistent()
        if not self._table.free:
            raise BackendError("all slots are taken; restore a prompt before requests run")
        self._stop_running_ahead()
        slot = self._table.oldest()
        self._table.put(slot, (), self.stats.steps)
        self._mend(slot)
        slots.restore(slot, tensors)
        self._table.put(slot, tokens, self.stats.steps)

    def lend(self, tokens: Tokens[int], most: int = 0) -> Place | None:
        """A slot in which somebody else will run ``tokens`` (`feed_lent`) between the steps, until
        `take_back`. It holds `Place.keep` of them already, ``most`` at most. None while all are
        taken, or while one reads a prompt that begins alike.

        Raises:
            BackendError: the tokens are none, too many, or foreign.
        """
        check_tokens(tokens, self.spec, self.capacity, "the prompt")
        if not self._table.free:
            return None
        self._stop_running_ahead()
        place = self._table.lend(tokens, most)
        if place is not None:
            self._prepare(place)
        return place

    def feed_lent(self, feeds: Tokens[Feed]) -> Logits:
        """Run tokens through lent slots, each at most once."""
        self._stop_running_ahead()
        return self._slots.feed(feeds)

    def take_back(self, slot: int, tokens: Tokens[int], *, sound: bool = True) -> None:
        """A lent slot is free again. It holds ``tokens``, which prompts may build upon; nothing
        of use, perhaps NaN, if it is not ``sound``."""
        self._table.take_back(slot, tokens if sound else (), self.stats.steps)
        if not sound:
            self._spoilt.add(slot)

    def _persistent(self) -> PersistentSlots:
        if not isinstance(self._slots, PersistentSlots):
            raise BackendError("this backend cannot save prompts; use torch or mlx")
        return self._slots

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self._stop_running_ahead()
        self._waiting.clear()
        self._running.clear()
        self._drafter.close()
        self._slots.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self) -> None:
        """Give slots to those that wait, in order; one that another one's prefix will soon serve
        is passed over until then."""
        if not (self._waiting and self._table.free):
            return
        self._stop_running_ahead()
        passed_over = 0
        for sequence in list(islice(self._waiting, self._table.free)):
            place = self._table.find(sequence.tokens)
            if place is not None:
                self._waiting.remove(sequence)
                self._seat(sequence, place)
            elif (passed_over := passed_over + 1) == _MOST_PASSED_OVER:
                break

    def _mend(self, slot: int) -> None:
        """Clear a slot that is about to be used if it was left with NaN."""
        if slot in self._spoilt:
            self._spoilt.remove(slot)
            self._slots.clear(slot)

    def _prepare(self, place: Place) -> None:
        """Bring what a place promises into its slot."""
        self._mend(place.slot)
        if place.source != place.slot:
            self._slots.copy(place.source, place.slot, place.keep)

    def _seat(self, sequence: Sequence, place: Place) -> None:
        self._prepare(place)
        self._table.take(place, sequence)
        self._running[sequence.key] = sequence
        self.stats.prompt_tokens += len(sequence.tokens)
        self.stats.cached_tokens += place.keep
        self._drafter.begin(sequence.key, sequence.request)

    def _follow_ahead(self) -> list[TokenEvent] | None:
        """A step of the device's own; None if it takes none."""
        pairs = None if self._ahead is None else self._ahead.step()
        if pairs is None:
            self._stop_running_ahead()
            return None
        events = []
        for sequence, token in pairs:
            sequence.fed += 1
            events.append(self._event(sequence, token))
        if self._ahead is not None and not self._ahead.worthwhile:
            self._stop_running_ahead()
        return events

    def _run_ahead(self) -> None:
        """Let the device go on by itself if it can: for some steps only while slots are wanted and
        become free every few steps, since what it has done ahead of an admission is lost."""
        sequences = list(self._running.values())
        if self.speculates or not can_run_ahead(self._slots, sequences):
            return
        busy = self._waiting and self.stats.steps - self._last_end <= _CALM
        self._ahead = RunAhead(self._slots, sequences, _BURST if busy else None)

    def _stop_running_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _advance(self) -> list[TokenEvent]:
        """One pass over all that run."""
        feeds, blocks = compose(self._running.values(), self._drafts(), self._prefill)
        logits = self._slots.feed(feeds)
        if not blocks:
            return []
        drawn = draw(logits, blocks)
        return [
            event
            for block, tokens_drawn in zip(blocks, drawn, strict=True)
            for event in self._keep(block, tokens_drawn)
        ]

    def _drafts(self) -> dict[int, tuple[int, ...]]:
        """Guesses for those that are between two draws, of a drafter or of their own grammar."""
        asked = [
            Unfinished(item.key, item.tokens, item.left - 1, item.sampler)
            for item in self._running.values()
            if item.unfed == 1
            and item.left > 1
            and (self.speculates or item.request.constraint is not None)
        ]
        guesses = self._drafter.propose(asked) if asked else []
        self.stats.drafted += sum(map(len, guesses))
        return {item.key: guess for item, guess in zip(asked, guesses, strict=True)}

    def _keep(self, block: Block, drawn: list[Drawn]) -> list[TokenEvent]:
        """Events of what was drawn, up to where the request ends."""
        sequence = block.sequence
        self.stats.accepted += len(drawn) - 1
        sequence.fed += len(drawn) - 1
        constraint = sequence.request.constraint
        events = []
        for place, (token, logprob, top) in enumerate(drawn, 1):
            over = place == len(drawn) and constraint is not None and constraint.finished
            events.append(self._event(sequence, token, logprob, top, over=over))
            if events[-1].finish_reason is not None:
                break
        sequence.fed = min(sequence.fed, len(sequence.tokens))
        return events

    def _event(
        self,
        sequence: Sequence,
        token: int,
        logprob: float | None = None,
        top: tuple[tuple[int, float], ...] = (),
        *,
        over: bool = False,
    ) -> TokenEvent:
        """Count ``token`` as drawn; the last one, after which it is ``over``, gives the slot
        back."""
        if token == BROKEN:
            self._release(sequence)
            self._table.put(sequence.slot, (), self.stats.steps)
            self._spoilt.add(sequence.slot)
            return TokenEvent(sequence.key, token, "error")
        sequence.tokens.append(token)
        sequence.left -= 1
        self.stats.generated_tokens += 1
        sampling = sequence.request.sampling
        reason: FinishReason | None = sampling.finish_reason(token, sequence.left)
        if over:
            reason = "stop"
        if reason is not None:
            self._release(sequence)
        return TokenEvent(sequence.key, token, reason, logprob, top)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._last_end = self.stats.steps
        self._table.leave(sequence, self.stats.steps)
        self._drafter.forget(sequence.key)
