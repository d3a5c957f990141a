"""A slot in somebody else's hands: right logits there, and nothing of it is felt elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.backend.slots import Feed
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.errors import BackendError
from qwen2kit.generate.sampling import Sampling
from tests.unit.engine.hash_model import HashModel, alone

CAPACITY = 64
LENT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


def _rows(engine: Engine, slot: int, start: int, tokens: tuple[int, ...]) -> np.ndarray:
    feed = Feed(slot, start, tokens, wanted=len(tokens))
    return engine.feed_lent([feed]).rows(range(len(tokens)))


def _lend(engine: Engine) -> int | None:
    place = engine.lend(LENT)
    return None if place is None else place.slot


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_pieces_between_the_steps_of_others(sampling: Sampling) -> None:
    model = HashModel()
    asked = [
        Request((n, 7, n), Sampling(max_new_tokens=9, temperature=sampling.temperature, seed=n), n)
        for n in range(1, 6)
    ]
    with Engine(model, slots=3, capacity=CAPACITY) as engine:  # type: ignore[arg-type]
        keys = [engine.submit(request) for request in asked]
        said: dict[int, list[int]] = {key: [] for key in keys}
        slot, rows, fed, lent = None, [], 0, 0
        while engine.busy:
            for event in engine.step():
                said[event.prompt].append(event.token)
            if slot is None and lent < 2:
                slot, rows, fed = _lend(engine), [], 0
            if slot is None:
                continue
            if fed < len(LENT):
                rows.append(_rows(engine, slot, fed, LENT[fed : fed + 5]))
                fed += 5
            else:
                np.testing.assert_array_equal(np.concatenate(rows), model.logits(LENT))
                engine.take_back(slot, LENT)
                slot, lent = None, lent + 1
    assert lent == 2
    for key, request in zip(keys, asked, strict=True):
        assert said[key] == [drawn.token for drawn, _ in alone(model, request, CAPACITY)]


def test_there_is_none_while_all_are_taken_and_no_request_takes_a_lent_one() -> None:
    model = HashModel()
    with Engine(model, slots=1, capacity=CAPACITY) as engine:  # type: ignore[arg-type]
        engine.submit(Request((1, 2), Sampling(max_new_tokens=3)))
        engine.step()
        assert engine.lend(LENT) is None
        while engine.busy:
            engine.step()
        slot = _lend(engine)
        assert slot is not None
        engine.submit(Request((1, 2), Sampling(max_new_tokens=3)))
        assert engine.step() == []
        assert (engine.running, engine.waiting) == (0, 1)
        engine.take_back(slot, ())
        assert len(engine.step()) == 1


def test_what_was_run_there_serves_later_prompts() -> None:
    model = HashModel()
    with Engine(model, slots=2, capacity=CAPACITY) as engine:  # type: ignore[arg-type]
        slot = _lend(engine)
        assert slot is not None
        _rows(engine, slot, 0, LENT)
        engine.take_back(slot, LENT)
        engine.submit(Request((*LENT, 11), Sampling(max_new_tokens=1)))
        engine.step()
        assert engine.stats.cached_tokens == len(LENT)


def test_an_unsound_one_is_cleared_before_its_next_use() -> None:
    model = HashModel()
    with Engine(model, slots=1, capacity=CAPACITY) as engine:  # type: ignore[arg-type]
        cleared: list[int] = []
        model.given[0].clear = cleared.append  # type: ignore[method-assign]
        for sound, times in ((True, 0), (False, 0), (True, 1), (True, 1)):
            slot = _lend(engine)
            assert slot is not None
            assert len(cleared) == times
            engine.take_back(slot, LENT, sound=sound)


@pytest.mark.parametrize("tokens", [(), (1,) * (CAPACITY + 1), (1, 80), (-1,)])
def test_what_can_never_run_is_refused(tokens: tuple[int, ...]) -> None:
    with (
        Engine(HashModel(), slots=1, capacity=CAPACITY) as engine,  # type: ignore[arg-type]
        pytest.raises(BackendError, match="the prompt"),
    ):
        engine.lend(tokens)
