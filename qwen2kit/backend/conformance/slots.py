"""Cases about slots: feeding, cutting back, copying, running ahead, what is read from logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.conformance.case import Case, require, require_close, require_raises
from qwen2kit.backend.conformance.models import (
    TOLERANCE,
    UNTIED,
    WINDOW,
    loaded,
    poisoned_weights,
    reference_continuation,
    reference_logits,
    tokens,
    weights,
)
from qwen2kit.backend.protocol import Backend
from qwen2kit.backend.slots import (
    ANCHORED_KEYS,
    BROKEN,
    Edit,
    Feed,
    Logits,
    PersistentSlots,
    Shortlist,
    Slots,
)
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.errors import BackendError
from qwen2kit.generate.edit import pack_mask
from qwen2kit.generate.sampling import Sampling
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import from_float32

_LONG, _MIDDLE, _SHORT = tokens(40, seed=21), tokens(13, seed=22), tokens(5, seed=23)


@contextmanager
def _slots(backend: Backend, spec: ModelSpec = UNTIED) -> Iterator[Slots]:
    slots = loaded(backend, spec).slots(3, 64)
    require(slots.count == 3, f"{slots.count} slots instead of 3 of 64 tokens")
    require(slots.capacity >= 64, f"capacity {slots.capacity} instead of 64")
    try:
        yield slots
    finally:
        slots.close()


def _expect(logits: Logits, *wanted: tuple[tuple[int, ...], int], spec: ModelSpec = UNTIED) -> None:
    """``logits`` are those of the last ``n`` positions of every ``(ids, n)``."""
    expected = np.concatenate([reference_logits(spec, ids)[len(ids) - n :] for ids, n in wanted])
    found = logits.rows(range(len(expected)))
    require(found.dtype == np.float32, f"rows are {found.dtype}, expected float32")
    require_close("logits of a feed", found, expected, TOLERANCE)


def _feed(backend: Backend) -> None:
    with _slots(backend) as slots:
        logits = slots.feed([Feed(2, 0, _LONG, 40), Feed(0, 0, _SHORT, 0), Feed(1, 0, _MIDDLE, 3)])
        _expect(logits, (_LONG, 40), (_MIDDLE, 3))
        one, two, three = ((*ids, 7) for ids in (_LONG, _SHORT, _MIDDLE))
        logits = slots.feed([Feed(1, 13, (7,)), Feed(2, 40, (7,)), Feed(0, 5, (7,))])
        _expect(logits, (three, 1), (one, 1), (two, 1))
        require_close("some rows", logits.rows([2, 0]), logits.rows(range(3))[[2, 0]], 0)


def _chunks(backend: Backend, spec: ModelSpec) -> None:
    """The same text in pieces of many sizes, beside slots in other states."""
    with _slots(backend, spec) as slots:
        done = 0
        for size in (1, 2, 17, 1, 1, 9, 3, 6):
            feeds = [Feed(1, done, _LONG[done : done + size], size)]
            if done % 2:
                feeds.insert(0, Feed(0, 0, _MIDDLE, 0))
            logits = slots.feed(feeds)
            done += size
            _expect(logits, (_LONG[:done], size), spec=spec)
        require(done == len(_LONG), "the case is wrong")


def _truncate(backend: Backend, spec: ModelSpec) -> None:
    with _slots(backend, spec) as slots:
        slots.feed([Feed(0, 0, _LONG, 1), Feed(1, 0, _LONG, 1)])
        logits = slots.feed([Feed(0, 11, _SHORT, 5), Feed(1, 0, _SHORT, 2)])
        _expect(logits, ((*_LONG[:11], *_SHORT), 5), (_SHORT, 2), spec=spec)
        logits = slots.feed([Feed(0, 15, _MIDDLE, 1), Feed(1, 4, (9, 9, 9), 3)])
        first, second = (*_LONG[:11], *_SHORT[:4], *_MIDDLE), (*_SHORT[:4], 9, 9, 9)
        _expect(logits, (first, 1), (second, 3), spec=spec)


def _copy(backend: Backend, spec: ModelSpec) -> None:
    with _slots(backend, spec) as slots:
        slots.feed([Feed(0, 0, _LONG, 1), Feed(2, 0, _MIDDLE, 1)])
        slots.copy(0, 2, 30)
        slots.copy(2, 1, 1)
        logits = slots.feed([Feed(2, 30, _SHORT, 2), Feed(0, 40, (3,)), Feed(1, 1, (4, 5))])
        first, second, third = (*_LONG[:30], *_SHORT), (*_LONG, 3), (_LONG[0], 4, 5)
        _expect(logits, (first, 2), (second, 1), (third, 1), spec=spec)


def _greedy_of(ids: tuple[int, ...], count: int, limit: int | None = None) -> tuple[int, ...]:
    sampling = Sampling(max_new_tokens=count, vocab_limit=limit)
    return reference_continuation(UNTIED, ids, sampling)


def _run_greedy(backend: Backend) -> None:
    """Whole runs, and one that is left in the middle: the slot goes on from what was yielded."""
    for limit in (None, 40):
        with _slots(backend) as slots:
            slots.feed([Feed(0, 0, _LONG[:-1], 0), Feed(2, 0, _MIDDLE[:-1], 0)])
            run = slots.run_greedy(
                [Feed(2, len(_MIDDLE) - 1, _MIDDLE[-1:]), Feed(0, len(_LONG) - 1, _LONG[-1:])],
                limit,
            )
            found = list(zip(*(next(run) for _ in range(9)), strict=True))
            close = getattr(run, "close", None)
            require(close is not None, "run_greedy() gives an iterator without close()")
            if close is not None:
                close()
            for mine, prompt in zip(found, (_MIDDLE, _LONG), strict=True):
                expected = _greedy_of(prompt, 9, limit)
                require(mine == expected, f"run_greedy gave {mine}, the reference {expected}")
            said = _greedy_of(_LONG, 9, limit)
            logits = slots.feed([Feed(0, len(_LONG) + 8, (said[-1], 5), 2), Feed(1, 0, _SHORT)])
            _expect(logits, ((*_LONG, *said, 5), 2), (_SHORT, 1))


def _run_to_the_end(backend: Backend) -> None:
    with _slots(backend) as slots:
        slots.feed([Feed(1, 0, _LONG[:-1], 0)])
        found = [ids[0] for ids in slots.run_greedy([Feed(1, 39, _LONG[-1:])], None)]
        least = 64 - len(_LONG) + 1
        require(len(found) >= least, f"run_greedy ended after {len(found)} steps of {least}")
        expected = _greedy_of(_LONG, least)
        require(tuple(found[:least]) == expected, f"{found[:least]}, expected {expected}")


def _run_some_steps(backend: Backend) -> None:
    """A run of few steps ends by itself, and another one goes on from it."""
    with _slots(backend) as slots:
        slots.feed([Feed(1, 0, _MIDDLE[:-1], 0)])
        said: list[int] = []
        last = _MIDDLE[-1]
        for steps in (1, 6, 2):
            feed = Feed(1, len(_MIDDLE) - 1 + len(said), (last,))
            found = [ids[0] for ids in slots.run_greedy([feed], None, steps)]
            require(len(found) == steps, f"{len(found)} steps where {steps} were asked for")
            said += found
            last = said[-1]
        expected = _greedy_of(_MIDDLE, 9)
        require(tuple(said) == expected, f"{said} in short runs, expected {expected}")


def _greedy(backend: Backend) -> None:
    with _slots(backend) as slots:
        logits = slots.feed([Feed(0, 0, _LONG, 40)])
        for limit in (None, 3, 50, UNTIED.vocab_size):
            expected = reference_logits(UNTIED, _LONG)[:, :limit].argmax(axis=-1)
            found = logits.greedy(limit)
            require(found == expected.tolist(), f"greedy({limit}) gave {found}")


def _edits() -> list[Edit]:
    rng = np.random.default_rng(7)
    ids = rng.permutation(UNTIED.vocab_size)[:9]
    scale = np.where(np.arange(9) % 2, 1.3, 1.0).astype(np.float32)
    shift = rng.standard_normal(9).astype(np.float32)
    few = pack_mask(np.arange(UNTIED.vocab_size) % 40 == 7)
    half = pack_mask(rng.random(UNTIED.vocab_size) < 0.5)
    return [
        Edit(),
        Edit(temperature=0.3),
        Edit(limit=20, temperature=2.0),
        Edit(ids=ids, scale=scale),
        Edit(ids=ids, shift=shift, temperature=0.7),
        Edit(limit=150, ids=ids[ids < 150], scale=scale[ids < 150], shift=shift[ids < 150]),
        Edit(allowed=half),
        Edit(limit=190, allowed=few, ids=ids[:1], shift=shift[:1], temperature=0.0),
    ]


def _shortlist(backend: Backend) -> None:
    edits = _edits()
    with _slots(backend) as slots:
        logits = slots.feed([Feed(0, 0, _LONG, len(edits))])
        rows = logits.rows(range(len(edits)))
        for size in (1, 16, 64):
            _compare(logits.shortlist(size, edits), HostLogits(rows).shortlist(size, edits), size)


def _compare(found: Shortlist, expected: Shortlist, size: int) -> None:
    for name in ("scores", "total", "raw_total"):
        values: NDArray[np.floating] = getattr(found, name)
        require(not np.isnan(values).any(), f"shortlist {name}: NaN")
    shape = expected.ids.shape
    require(found.ids.shape == shape, f"shortlist of {size}: ids {found.ids.shape}, not {shape}")
    require(found.total.dtype == np.float64, f"shortlist total is {found.total.dtype}")
    live = np.isfinite(expected.scores)
    same = np.isfinite(found.scores) == live
    require(same.all(), "shortlist: what is out does not have -inf")
    require(found.ids[live].tolist() == expected.ids[live].tolist(), "shortlist: other ids")
    require_close("shortlist scores", found.scores[live], expected.scores[live], 1e-5)
    require_close("shortlist raw", found.raw[live], expected.raw[live], 1e-5)
    require_close("shortlist total", found.total, expected.total, 1e-4)
    require_close("shortlist raw_total", found.raw_total, expected.raw_total, 1e-4)


def _ties(backend: Backend) -> None:
    """With an output matrix of zeros every token is as likely as any other."""
    flat = {}
    for param in schema(UNTIED):
        zeros = from_float32(np.zeros(param.shape, dtype=np.float32), "float32")
        is_head = param.name == schema(UNTIED)[-1].name
        flat[param.name] = zeros if is_head else weights(UNTIED).read(param.name)
    slots = loaded(backend, UNTIED, source=MemorySource(flat)).slots(1, 16)
    logits = slots.feed([Feed(0, 0, _SHORT, 3)])
    require(not logits.rows([0]).any(), "the case is wrong")
    for limit in (None, 50):
        found = logits.greedy(limit)
        require(found == [0, 0, 0], f"of equals greedy gave {found}, not the smallest")
    slots.close()


def _not_finite(backend: Backend) -> None:
    bad = {}
    for param in schema(UNTIED):
        tensor = weights(UNTIED).read(param.name)
        broken = np.full(param.shape, np.nan, dtype=np.float32)
        bad[param.name] = from_float32(broken, "float32") if param.kind == "norm" else tensor
    slots = loaded(backend, UNTIED, source=MemorySource(bad)).slots(1, 16)
    logits = slots.feed([Feed(0, 0, _SHORT, 2)])
    require(logits.greedy(None) == [BROKEN] * 2, "greedy does not say that logits are NaN")
    sound = logits.shortlist(8, [Edit()] * 2).sound
    require(not any(sound), "a shortlist does not say that logits are NaN")
    slots.close()


def _one_not_finite(backend: Backend) -> None:
    """NaN in one slot is felt by no other one, nor by what comes next in a slot once cleared."""
    poison = min(set(range(UNTIED.vocab_size)) - {*_LONG, *_MIDDLE, *_SHORT})
    model = loaded(backend, UNTIED, source=poisoned_weights(UNTIED, poison))
    slots = model.slots(3, 64)
    bad = (*_LONG[:20], poison)
    logits = slots.feed([Feed(0, 0, _MIDDLE), Feed(1, 0, bad), Feed(2, 0, _SHORT)])
    first = logits.greedy(None)
    require(first[1] == BROKEN, f"greedy gave {first[1]} for a row of NaN")
    require(logits.shortlist(8, [Edit()] * 3).sound == [True, False, True], "shortlist of a row")
    texts = {slot: [*ids, first[slot]] for slot, ids in ((0, _MIDDLE), (2, _SHORT))}
    feeds = [Feed(0, 13, (first[0],)), Feed(1, 21, (poison,)), Feed(2, 5, (first[2],))]
    for ids in islice(slots.run_greedy(feeds, None), 6):
        require(ids[1] == BROKEN or min(ids) >= 0, f"a run gave {ids}")
        for slot, text in texts.items():
            text.append(ids[slot])
    for slot, prompt in ((0, _MIDDLE), (2, _SHORT)):
        expected = reference_continuation(UNTIED, prompt, Sampling(max_new_tokens=7))
        require(tuple(texts[slot][len(prompt) :]) == expected, "NaN of another slot is felt")
    slots.clear(1)
    slots.feed([Feed(1, 0, _SHORT, 0), Feed(2, 0, _LONG, 0)])
    logits = slots.feed([Feed(1, 5, (7,)), Feed(2, 40, (7,))])
    _expect(logits, ((*_SHORT, 7), 1), ((*_LONG, 7), 1))
    slots.close()


def _refuses(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    require(
        model.limit == UNTIED.max_position_embeddings,
        f"limit is {model.limit}, expected {UNTIED.max_position_embeddings}",
    )
    require_raises(BackendError, lambda: model.slots(1, model.limit + 1), "capacity too large")
    slots = model.slots(2, 8)
    slots.close()
    slots.close()


def _persistence(backend: Backend) -> None:
    """What is saved from one slot is as good in another, of other slots too."""
    with _slots(backend) as slots, _slots(backend) as others:
        if not isinstance(slots, PersistentSlots) or not isinstance(others, PersistentSlots):
            return
        slots.feed([Feed(1, 0, _LONG, 1)])
        saved = list(slots.export(1, 25))
        shape = (UNTIED.num_key_value_heads, 25, UNTIED.head_dim)
        for name, tensor in saved:
            require(tuple(tensor.shape) == shape, f"{name} is {tensor.shape}, expected {shape}")
        names: Sequence[str] = sorted(name.replace(ANCHORED_KEYS, "keys") for name, _ in saved)
        expected = sorted(
            f"layers.{i}.{part}" for i in range(UNTIED.num_hidden_layers)
            for part in ("keys", "values")
        )  # fmt: skip
        require(names == expected, f"export names {names}")
        others.feed([Feed(2, 0, _MIDDLE, 1)])
        others.restore(2, iter(saved))
        _expect(others.feed([Feed(2, 25, _SHORT, 3)]), ((*_LONG[:25], *_SHORT), 3))


CASES = (
    Case("slots/feed", _feed),
    Case("slots/chunks", partial(_chunks, spec=UNTIED)),
    Case(
        "slots/chunks-multi-head",
        partial(_chunks, spec=replace(UNTIED, num_key_value_heads=4)),
    ),
    Case(
        "slots/chunks-sliding-window",
        partial(_chunks, spec=WINDOW),
        lambda has: has.sliding_window,
    ),
    Case("slots/truncate", partial(_truncate, spec=UNTIED)),
    Case("slots/copy", partial(_copy, spec=UNTIED)),
    Case(
        "slots/truncate-sliding-window",
        partial(_truncate, spec=WINDOW),
        lambda has: has.sliding_window,
    ),
    Case(
        "slots/copy-sliding-window",
        partial(_copy, spec=WINDOW),
        lambda has: has.sliding_window,
    ),
    Case("slots/run-greedy", _run_greedy),
    Case("slots/run-greedy-to-the-end", _run_to_the_end),
    Case("slots/run-greedy-some-steps", _run_some_steps),
    Case("slots/greedy", _greedy),
    Case("slots/shortlist", _shortlist),
    Case("slots/ties", _ties),
    Case("slots/not-finite", _not_finite),
    Case("slots/one-not-finite", _one_not_finite),
    Case("slots/refuses", _refuses),
    Case("slots/persistence", _persistence),
)
