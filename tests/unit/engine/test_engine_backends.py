"""The same on real slots: tiny float32 models, random schedules, next to whole passes alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.conformance.models import UNTIED, loaded, poisoned_weights
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.slots import BROKEN, Feed
from qwen2kit.engine.draft_model import DraftModel
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.generate import generate
from qwen2kit.engine.prompt_lookup import PromptLookup
from qwen2kit.engine.request import Request
from qwen2kit.errors import BackendError, NonFiniteLogits
from qwen2kit.generate.sampling import Sampling
from tests.unit.backend.third_party_backend import NumpyBackend
from tests.unit.engine.hash_model import EveryThird, HashModel, alone
from tests.unit.engine.test_engine import Guesser

SPEC = replace(UNTIED, vocab_size=80)
CAPACITY = 60


@pytest.fixture(scope="module", params=["torch", "mlx"])
def model(request: pytest.FixtureRequest) -> CompiledModel:
    pytest.importorskip("torch" if request.param == "torch" else "mlx.core")
    from qwen2kit.backend.registry import get

    return loaded(get(request.param), SPEC)


def some_request(dice: random.Random, plain: bool) -> Request:
    stem = [7 * i % 80 for i in range(dice.choice([0, 0, 3, 20, 20, 33]))]
    prompt = (*stem, *(dice.randrange(80) for _ in range(dice.randint(1, 12))))
    if plain:
        return Request(prompt, Sampling(max_new_tokens=dice.randint(1, 15)))
    sampling = Sampling(
        max_new_tokens=dice.randint(1, 15),
        stop_token_ids=dice.choice([(), (1, 2, 3, 4)]),
        temperature=dice.choice([0.0, 0.7, 1.2]),
        top_k=dice.choice([0, 10]),
        top_p=dice.choice([1.0, 0.9]),
        repetition_penalty=dice.choice([1.0, 1.1]),
        presence_penalty=dice.choice([0.0, 0.5]),
        vocab_limit=dice.choice([None, 70]),
        top_logprobs=dice.choice([0, 2]),
        seed=dice.randrange(9),
    )
    constrained = dice.random() < 0.3
    return Request(prompt, sampling, dice.randrange(3), EveryThird(1, 9) if constrained else None)


def again(request: Request) -> Request:
    """The request with its constraint at the beginning."""
    return request if request.constraint is None else replace(request, constraint=EveryThird(1, 9))


@pytest.mark.parametrize("drafts", [None, (3, 5)], ids=["plain", "drafts"])
@pytest.mark.parametrize("plain", [False, True], ids=["any", "greedy"])
@pytest.mark.parametrize("seed", range(4))
def test_each_request_gets_its_own_tokens(
    model: CompiledModel, seed: int, plain: bool, drafts: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("qwen2kit.engine.slot_table.WORTH_COPYING", 4)
    dice = random.Random(seed)
    requests = [some_request(dice, plain) for _ in range(10)]
    expected: list[list[Any]] = []
    for request in requests:
        room = CAPACITY - len(request.prompt)
        found = alone(model, again(request), room)  # type: ignore[arg-type]
        expected.append([(drawn.token, reason) for drawn, reason in found])
    guesser = None if drafts is None else Guesser(*drafts)
    if guesser is not None:
        guesser.answers = {
            request.prompt: [token for token, _ in tokens]
            for request, tokens in zip(requests, expected, strict=True)
        }
    said: dict[int, list[Any]] = {}
    cancelled = set()
    with Engine(
        model, slots=3, capacity=CAPACITY, prefill_tokens=dice.choice([1, 7, 64]), drafter=guesser
    ) as engine:
        waiting = list(requests)
        while waiting or engine.busy:
            if waiting and dice.random() < 0.4:
                said[engine.submit(waiting.pop(0))] = []
            if said and dice.random() < 0.03:
                cancelled.add(key := dice.choice(list(said)))
                engine.cancel(key)
            for event in engine.step():
                said[event.prompt].append((event.token, event.finish_reason))
    assert len(said) == len(requests)
    for key, mine in said.items():
        assert mine == expected[key][: len(mine)]
        assert key in cancelled or mine == expected[key]


@pytest.mark.parametrize("plain", [True, False], ids=["greedy", "any"])
def test_a_lent_slot_and_its_neighbours(model: CompiledModel, plain: bool) -> None:
    dice = random.Random(11)
    requests = [some_request(dice, plain) for _ in range(8)]
    text = tuple(dice.randrange(80) for _ in range(41))
    expected = model.logits(text)
    lent = kept = 0
    with Engine(model, slots=3, capacity=CAPACITY, prefill_tokens=9) as engine:
        said: dict[int, list[Any]] = {engine.submit(again(item)): [] for item in requests}
        slot, fed = None, 0
        while engine.busy:
            for event in engine.step():
                said[event.prompt].append((event.token, event.finish_reason))
            if slot is not None and fed == len(text):
                engine.take_back(slot, text)
                slot, lent = None, lent + 1
            if slot is None:
                place = engine.lend(text, most=dice.choice([0, 9, len(text)]))
                slot, fed = (None, 0) if place is None else (place.slot, place.keep)
                kept += fed
            else:
                piece = text[fed : fed + dice.choice([1, 4, 23])]
                feed = Feed(slot, fed, piece, len(piece))
                logits = engine.feed_lent([feed]).rows(range(len(piece)))
                np.testing.assert_allclose(logits, expected[fed : fed + len(piece)], atol=1e-4)
                fed += len(piece)
    assert lent >= 2
    assert kept > 0
    for key, request in enumerate(requests):
        found = alone(model, again(request), CAPACITY - len(request.prompt))  # type: ignore[arg-type]
        assert said[key] == [(drawn.token, reason) for drawn, reason in found]


POISON = 73  # in no stem


@pytest.fixture(scope="module", params=["numpy", "torch", "mlx"])
def poisoned(request: pytest.FixtureRequest) -> CompiledModel:
    """A model whose logits are NaN from the first `POISON` of a text on."""
    weights = poisoned_weights(SPEC, POISON)
    if request.param == "numpy":
        return loaded(NumpyBackend(), SPEC, source=weights)
    pytest.importorskip("torch" if request.param == "torch" else "mlx.core")
    from qwen2kit.backend.registry import get

    return loaded(get(request.param), SPEC, source=weights)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plain", [True, False], ids=["greedy", "any"])
@pytest.mark.parametrize("draft", [False, True], ids=["plain", "drafts"])
def test_nan_ends_its_own_request_and_no_other(
    poisoned: CompiledModel, draft: bool, plain: bool, seed: int
) -> None:
    """More requests than slots, so that slots that held NaN are used again."""
    dice = random.Random(seed)
    requests = [some_request(dice, plain) for _ in range(9)]
    broken = {key for key in range(9) if key % 3 == 1}
    for key in broken:
        prompt = requests[key].prompt
        at = dice.randrange(len(prompt)) if key == 1 else len(prompt) - 1
        requests[key] = replace(requests[key], prompt=(*prompt[:at], POISON, *prompt[at + 1 :]))
    expected: dict[int, list[Any]] = {}
    for key, request in enumerate(requests):
        try:
            found = alone(poisoned, again(request), CAPACITY - len(request.prompt))  # type: ignore[arg-type]
        except NonFiniteLogits:
            broken.add(key)
        else:
            expected[key] = [(drawn.token, reason) for drawn, reason in found]
    assert 3 <= len(broken) <= 6
    said: dict[int, list[Any]] = {key: [] for key in range(9)}
    drafter = PromptLookup(4) if draft else None
    with Engine(poisoned, slots=3, capacity=CAPACITY, prefill_tokens=16, drafter=drafter) as engine:
        for request in requests:
            engine.submit(again(request))
        while engine.busy:
            for event in engine.step():
                said[event.prompt].append((event.token, event.finish_reason))
        assert engine.running == engine.waiting == 0
    for key, mine in said.items():
        if key in broken:
            assert mine[-1] == (BROKEN, "error")
        else:
            assert mine == expected[key]


@pytest.mark.parametrize("plain", [True, False], ids=["greedy", "any"])
def test_nan_of_a_draft_model_changes_nothing(poisoned: CompiledModel, plain: bool) -> None:
    """It is the sound target's twin otherwise, so that guesses of other requests are right."""
    target = loaded(NumpyBackend(), SPEC)
    dice = random.Random(5)
    requests = [some_request(dice, plain) for _ in range(9)]
    for key in (0, 4, 5):
        requests[key] = replace(requests[key], prompt=(*requests[key].prompt[:-1], POISON))
    drafter = DraftModel(poisoned, target, slots=3, capacity=CAPACITY, longest=4, cost=0.01)
    with Engine(target, slots=3, capacity=CAPACITY, drafter=drafter) as engine:
        said: dict[int, list[Any]] = {engine.submit(again(item)): [] for item in requests}
        while engine.busy:
            for event in engine.step():
                said[event.prompt].append((event.token, event.finish_reason))
    for key, request in enumerate(requests):
        room = CAPACITY - len(request.prompt)
        found = alone(target, again(request), room)  # type: ignore[arg-type]
        assert said[key] == [(drawn.token, reason) for drawn, reason in found]
    assert engine.stats.accepted > 10


def test_generate_says_it_when_the_others_have_ended(poisoned: CompiledModel) -> None:
    prompts = [(1, 2), (3, POISON), (4, 5)]
    events = generate(poisoned, prompts, Sampling(max_new_tokens=6, vocab_limit=POISON))
    assert sorted(next(events).prompt for _ in range(12)) == [0] * 6 + [2] * 6
    with pytest.raises(NonFiniteLogits, match="NaN or infinite"):
        next(events)


def test_a_saved_prompt_is_not_read_again(model: CompiledModel) -> None:
    prompt = tuple(7 * i % 80 for i in range(40))
    request = Request((*prompt, 5, 6), Sampling(max_new_tokens=6))
    with Engine(model, slots=2, capacity=CAPACITY) as engine:
        expected = _tokens(engine, request)
        length, tensors = engine.export((*prompt, 70, 71))
        saved = list(tensors)
    assert length == len(prompt)
    with Engine(model, slots=2, capacity=CAPACITY) as engine:
        engine.restore(prompt, iter(saved))
        assert _tokens(engine, request) == expected
        assert engine.stats.cached_tokens == len(prompt)
        engine.submit(request)
        engine.submit(request)
        engine.step()
        engine.step()
        with pytest.raises(BackendError, match="all slots are taken"):
            engine.restore(prompt, iter(saved))
        with pytest.raises(BackendError, match="the saved prompt has 61 tokens"):
            engine.restore([1] * 61, iter(saved))


def test_other_slots_say_that_they_cannot_be_saved() -> None:
    with Engine(HashModel(), slots=1, capacity=9) as engine:  # type: ignore[arg-type]
        with pytest.raises(BackendError, match="cannot save prompts"):
            engine.export([1])
        with pytest.raises(BackendError, match="cannot save prompts"):
            engine.restore([1], iter(()))


def _tokens(engine: Engine, request: Request) -> list[int]:
    engine.submit(request)
    found = []
    while engine.busy:
        found += [event.token for event in engine.step()]
    return found
