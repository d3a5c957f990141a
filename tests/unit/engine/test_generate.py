"""`generate`: one batch, whatever its shape, and what is left when it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.engine.generate import generate
from qwen2kit.engine.request import Request
from qwen2kit.errors import BackendError
from qwen2kit.generate.sampling import Sampling
from tests.unit.engine.hash_model import HashModel, WatchedSlots, alone

SAMPLED = Sampling(max_new_tokens=9, temperature=1.0, stop_token_ids=(3, 4), seed=5)
PROMPTS = [tuple(range(start, start + size)) for start, size in ((5, 9), (7, 1), (9, 30), (1, 9))]


def continue_(
    model: HashModel, prompts: Sequence[tuple[int, ...]], sampling: Sampling
) -> list[list[TokenEvent]]:
    found: list[list[TokenEvent]] = [[] for _ in prompts]
    for event in generate(model, prompts, sampling):  # type: ignore[arg-type]
        found[event.prompt].append(event)
    return found


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=9), SAMPLED], ids=["greedy", "hot"])
def test_every_prompt_has_the_random_stream_of_its_index(sampling: Sampling) -> None:
    model = HashModel()
    prompts = [*PROMPTS, PROMPTS[0]]
    for index, mine in enumerate(continue_(model, prompts, sampling)):
        request = Request(prompts[index], sampling, stream=index)
        expected = [(drawn.token, reason) for drawn, reason in alone(model, request, 99)]
        assert [(event.token, event.finish_reason) for event in mine] == expected
    assert [slots.closed for slots in model.given] == [True]
    assert [(slots.count, slots.capacity) for slots in model.given] == [(5, 39)]


def test_fewer_slots_than_prompts_change_nothing() -> None:
    class Cramped(HashModel):
        def slots(self, count: int, capacity: int) -> WatchedSlots:
            return super().slots(min(count, 2), capacity)

    sampling = Sampling(max_new_tokens=9, top_logprobs=2)
    assert continue_(Cramped(), PROMPTS, sampling) == continue_(HashModel(), PROMPTS, sampling)


def test_the_limit_ends_a_text_and_a_full_prompt_gets_one_token() -> None:
    model = HashModel(limit=24)
    prompts = [(1,) * size for size in (4, 20, 23, 24)]
    found = continue_(model, prompts, Sampling(max_new_tokens=9))
    assert [len(mine) for mine in found] == [9, 4, 1, 1]
    assert {mine[-1].finish_reason for mine in found} == {"length"}
    assert model.given[0].capacity == 24


def test_a_long_prompt_among_short_ones_gets_slots_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen2kit.engine.generate._SPARE_TOKENS", 200)
    model = HashModel(limit=4000)
    prompts = [(1,) * size for size in (10, 300, 12, 3000, 14)]
    found = continue_(model, prompts, Sampling(max_new_tokens=3))
    assert [len(mine) for mine in found] == [3] * 5
    assert [(s.count, s.capacity) for s in model.given] == [(3, 17), (1, 303), (1, 3003)]


def test_closing_frees_the_slots_and_two_can_go_on_at_a_time() -> None:
    model = HashModel()
    first = generate(model, PROMPTS, SAMPLED)  # type: ignore[arg-type]
    second = generate(model, PROMPTS, SAMPLED)  # type: ignore[arg-type]
    pairs = [(next(first), next(second)) for _ in range(6)]
    assert all(one == two for one, two in pairs)
    first.close()  # type: ignore[attr-defined]
    assert [slots.closed for slots in model.given] == [True, False]
    assert len(list(second)) > 5
    assert [slots.closed for slots in model.given] == [True, True]


def test_nothing_to_do_needs_no_memory() -> None:
    model = HashModel()
    assert list(generate(model, [], SAMPLED)) == []  # type: ignore[arg-type]
    assert model.given == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "prompt 1 is empty"),
        ((1,) * 97, "prompt 1 has 97 tokens, this model takes 96"),
        ((-1,), "prompt 1 holds token id -1"),
        ((80,), "outside the vocabulary of 80"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(
    prompt: tuple[int, ...], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        generate(HashModel(), [(1,), prompt], SAMPLED)  # type: ignore[arg-type]
