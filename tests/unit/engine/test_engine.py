"""Whatever the engine does at the same time, every request gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.engine.drafting import Unfinished
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.generate.sampling import Sampling
from tests.unit.engine.hash_model import EveryThird, HashModel, alone

CAPACITY = 40
STEMS = ((), (5, 6, 7, 8), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14), (5, 6, 1), (60,) * 12)


@dataclass(frozen=True)
class Wish:
    """How to make a request, as often as it is wanted (constraints have a state)."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stream: int
    constraint: tuple[int, int] | None

    def request(self) -> Request:
        constraint = None if self.constraint is None else EveryThird(*self.constraint)
        return Request(self.prompt, self.sampling, self.stream, constraint)


class Guesser:
    """A drafter that knows the right answers and gives every ``wrong``-th token wrong."""

    def __init__(self, wrong: int, length: int) -> None:
        self.wrong, self.length = wrong, length
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.known: dict[int, Request] = {}
        self.closed = False

    def begin(self, key: int, request: Request) -> None:
        assert key not in self.known
        self.known[key] = request

    def propose(self, sequences: Sequence[Unfinished]) -> list[tuple[int, ...]]:
        return [self._guess(item) for item in sequences]

    def _guess(self, item: Unfinished) -> tuple[int, ...]:
        prompt = self.known[item.key].prompt
        rest = self.answers[prompt][len(item.tokens) - len(prompt) :]
        count = min(item.limit, len(item.tokens) * 3 // 2 % (self.length + 1))
        return tuple(
            (token + 1) % 80 if (len(item.tokens) + place) % self.wrong == 0 else token
            for place, token in enumerate(rest[:count])
        )

    def forget(self, key: int) -> None:
        del self.known[key]

    def close(self) -> None:
        self.closed = True


prompts = st.builds(
    lambda stem, rest: (stem + tuple(rest)) or (3,),
    st.sampled_from(STEMS),
    st.lists(st.integers(0, 79), max_size=12),
)
samplings = st.builds(
    Sampling,
    max_new_tokens=st.integers(1, 14),
    stop_token_ids=st.sampled_from([(), (), (1, 2, 3), tuple(range(0, 80, 7))]),
    temperature=st.sampled_from([0.0, 0.0, 0.0, 0.8, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.6]),
    vocab_limit=st.sampled_from([None, None, 50]),
    top_logprobs=st.sampled_from([0, 0, 2]),
    seed=st.integers(0, 3),
)
plain = st.builds(Sampling, max_new_tokens=st.integers(1, 14), vocab_limit=st.just(70))
constraints = st.one_of(st.none(), st.none(), st.tuples(st.integers(0, 2), st.integers(1, 9)))
wishes = st.builds(Wish, prompts, samplings, st.integers(0, 2), constraints)
plain_wishes = st.builds(Wish, prompts, plain, st.just(0), st.none())
actions = st.lists(
    st.one_of(
        wishes, plain_wishes, st.integers(1, 6), st.tuples(st.just("cancel"), st.integers(0, 9))
    ),
    min_size=1,
    max_size=24,
)  # fmt: skip


def expected_of(model: HashModel, wish: Wish) -> list[tuple[int, str | None]]:
    room = max(1, CAPACITY - len(wish.prompt))
    return [(drawn.token, reason) for drawn, reason in alone(model, wish.request(), room)]


def play(engine: Engine, schedule: Sequence[Any], submit: Callable[[Wish], int]) -> Iterator[Any]:
    """Carry out ``schedule`` and go on to the end; what happens, in order."""
    keys: list[int] = []
    for action in schedule:
        if isinstance(action, Wish):
            keys.append(submit(action))
            yield keys[-1], action
        elif isinstance(action, tuple):
            if keys:
                key = keys[action[1] % len(keys)]
                engine.cancel(key)
                yield "cancel", key
        else:
            for _ in range(action):
                yield engine.step()
    while engine.busy:
        yield engine.step()


@settings(max_examples=250, deadline=None)
@given(
    schedule=actions,
    slots=st.integers(1, 5),
    prefill=st.sampled_from([1, 3, 8, 64]),
    worth=st.sampled_from([1, 3, 100]),
    drafts=st.sampled_from([None, None, (1, 3), (2, 5), (5, 4), (99, 6)]),
)
def test_any_schedule_gives_each_request_its_own_tokens(
    schedule: list[Any],
    slots: int,
    prefill: int,
    worth: int,
    drafts: tuple[int, int] | None,
) -> None:
    model, guesser = HashModel(), None if drafts is None else Guesser(*drafts)
    found: dict[int, list[TokenEvent]] = {}
    wanted: dict[int, Wish] = {}
    cancelled: set[int] = set()
    with patch("qwen2kit.engine.slot_table.WORTH_COPYING", worth):
        engine = Engine(
            model,  # type: ignore[arg-type]
            slots=slots, capacity=CAPACITY, prefill_tokens=prefill, drafter=guesser,
        )  # fmt: skip

        def submit(wish: Wish) -> int:
            if guesser is not None:
                guesser.answers[wish.prompt] = [token for token, _ in expected_of(model, wish)]
            return engine.submit(wish.request())

        for happening in play(engine, schedule, submit):
            if isinstance(happening, list):
                for event in happening:
                    assert event.prompt not in cancelled
                    found[event.prompt].append(event)
            elif happening[0] == "cancel":
                cancelled.add(happening[1])
            else:
                wanted[happening[0]], found[happening[0]] = happening[1], []
        _check(model, wanted, found, cancelled)
        assert engine.running == engine.waiting == 0
        assert engine._table.free == slots
        assert guesser is None or not guesser.known
        assert engine.stats.generated_tokens == sum(map(len, found.values()))
        engine.close()
    assert model.given[0].closed
    assert not model.given[0].running
    for feeds in model.given[0].fed:
        assert sum(len(feed.tokens) for feed in feeds if feed.wanted == 0) <= prefill


def _check(
    model: HashModel,
    wanted: dict[int, Wish],
    found: dict[int, list[TokenEvent]],
    cancelled: set[int],
) -> None:
    for key, wish in wanted.items():
        expected = expected_of(model, wish)
        mine = [(event.token, event.finish_reason) for event in found[key]]
        finished = bool(mine) and mine[-1][1] is not None
        if key in cancelled and not finished:
            assert mine == expected[: len(mine)]
        else:
            assert mine == expected
        assert all(len(e.top) == wish.sampling.top_logprobs for e in found[key])


def run(engine: Engine, *requests: Request) -> dict[int, list[int]]:
    """Tokens by key, once all is done."""
    found: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.prompt, []).append(event.token)
    return found


def engine_of(model: HashModel, **options: Any) -> Engine:
    return Engine(model, **{"slots": 4, "capacity": 90} | options)  # type: ignore[arg-type]


def test_a_follow_up_computes_only_what_is_new() -> None:
    model = HashModel()
    engine = engine_of(model)
    prompt = tuple(range(40))
    said = run(engine, Request(prompt, Sampling(max_new_tokens=10)))[0]
    assert engine.stats.cached_tokens == 0
    again = (*prompt, *said, 7, 7)
    run(engine, Request(again, Sampling(max_new_tokens=5)))
    # The last token said was never fed.
    assert engine.stats.cached_tokens == len(prompt) + len(said) - 1
    fed = [feed for feeds in model.given[0].fed[1:] for feed in feeds]
    assert fed[-1].tokens == (said[-1], 7, 7)
    assert model.given[0].copies == []


def test_the_same_prompt_again_feeds_one_token() -> None:
    model = HashModel()
    engine = engine_of(model)
    request = Request(tuple(range(40)), Sampling(max_new_tokens=3))
    first = run(engine, request)[0]
    assert run(engine, request)[1] == first
    assert engine.stats.cached_tokens == 39
    assert sum(len(feed.tokens) for feeds in model.given[0].fed for feed in feeds) == 40
    assert model.given[0].run_steps == 5


def test_n_answers_to_one_prompt_read_it_once() -> None:
    model = HashModel()
    engine = engine_of(model, prefill_tokens=16)
    prompt = tuple(range(40))
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    found = run(engine, *(Request(prompt, sampling, stream=i) for i in range(4)))
    assert len({tuple(tokens) for tokens in found.values()}) > 1
    assert engine.stats.cached_tokens == 3 * 39
    assert sorted(length for _, _, length in model.given[0].copies) == [39, 39, 39]
    fed = sum(len(feed.tokens) for feeds in model.given[0].fed for feed in feeds)
    assert fed + model.given[0].run_rows == 40 + 3 + 4 * 5


def test_a_shared_stem_is_copied_from_a_slot_in_use() -> None:
    model = HashModel()
    engine = engine_of(model)
    stem = tuple(range(50))
    first = engine.submit(Request((*stem, 1, 2), Sampling(max_new_tokens=20)))
    engine.step()
    second = engine.submit(Request((*stem, 3, 4), Sampling(max_new_tokens=2)))
    while engine.busy:
        assert {event.prompt for event in engine.step()} <= {first, second}
    assert [length for _, _, length in model.given[0].copies] == [50]
    assert engine.stats.cached_tokens == 50


def test_a_short_common_beginning_does_not_cost_a_long_cached_one() -> None:
    """Six shared tokens are no reason to overwrite a conversation of sixty."""
    model = HashModel()
    engine = engine_of(model, slots=2)
    long, short = tuple(range(60)), (*range(6), 79, 78)
    sampling = Sampling(max_new_tokens=2)
    run(engine, Request(long, sampling))
    run(engine, Request(short, sampling))
    before = engine.stats.cached_tokens
    run(engine, Request((*long, 5), sampling))
    assert engine.stats.cached_tokens - before == 60


def test_the_slot_left_longest_ago_is_taken() -> None:
    model = HashModel()
    engine = engine_of(model, slots=2)
    one, two, three = ((i,) * 30 for i in (1, 2, 3))
    sampling = Sampling(max_new_tokens=2)
    for prompt in (one, two, one, three):
        run(engine, Request(prompt, sampling))
    before = engine.stats.cached_tokens
    run(engine, Request(one, sampling))
    assert engine.stats.cached_tokens - before == 29
    run(engine, Request(two, sampling))
    assert engine.stats.cached_tokens - before == 29


def test_long_prompts_never_stop_running_requests() -> None:
    model = HashModel()
    engine = engine_of(model, prefill_tokens=4)
    talker = engine.submit(Request((1, 2), Sampling(max_new_tokens=30)))
    engine.step()
    reader = engine.submit(Request(tuple(range(40)), Sampling(max_new_tokens=1)))
    for _ in range(9):
        assert [event.prompt for event in engine.step()] == [talker]
    assert {event.prompt for event in engine.step()} == {talker, reader}


def test_a_freed_slot_is_filled_in_the_next_step() -> None:
    engine = engine_of(HashModel(), slots=1)
    run_order = [engine.submit(Request((i,), Sampling(max_new_tokens=2))) for i in range(3)]
    seen = [[event.prompt for event in engine.step()] for _ in range(6)]
    assert [key for step in seen for key in step] == [k for key in run_order for k in (key, key)]
    assert not engine.busy


def test_plain_greedy_runs_ahead_and_stays_ahead_while_all_slots_are_taken() -> None:
    model = HashModel()
    engine = engine_of(model, slots=2)
    requests = [Request((i, 9), Sampling(max_new_tokens=12)) for i in range(2)]
    waiting = Request((70,), Sampling(max_new_tokens=3))
    found = run(engine, *requests, waiting)
    slots = model.given[0]
    assert slots.run_steps > 8
    assert slots.runs <= 3
    for key, request in enumerate((*requests, waiting)):
        assert found[key] == [drawn.token for drawn, _ in alone(model, request, 99)]


@pytest.mark.parametrize(("together", "runs"), [(4, 4), (16, 1)])
def test_a_run_carries_few_that_have_ended(together: int, runs: int) -> None:
    """One of sixteen is carried on to the others' end; one of four is not."""
    model = HashModel()
    engine = engine_of(model, slots=together)
    lengths = [10, *[30] * (together - 1)] if together == 16 else [10, 15, 20, 25]
    run(engine, *(Request((i, 9), Sampling(max_new_tokens=n)) for i, n in enumerate(lengths)))
    assert model.given[0].runs == runs
    assert engine.stats.generated_tokens == sum(lengths)
    assert engine._table.free == together


def test_a_sampled_request_joins_the_run_and_one_that_reports_ends_it() -> None:
    model = HashModel()
    engine = engine_of(model)
    for steps, how in ((5, {}), (10, {"temperature": 1.0}), (10, {"logprobs": True})):
        engine.submit(Request((steps,), Sampling(max_new_tokens=40, **how)))  # type: ignore[arg-type]
        for _ in range(5):
            engine.step()
        assert model.given[0].run_steps == steps
    for key in range(3):
        engine.cancel(key)
    assert engine.step() == []


def test_runs_end_by_themselves_while_slots_are_wanted_and_become_free() -> None:
    """Requests end every few steps, others wait: what had run ahead of them would be lost."""
    for lengths, calm in (([3, 4, 5, 6, 9] * 4, False), ([30, 30, 30, 30], True)):
        model = HashModel()
        engine = engine_of(model, slots=2)
        requests = [Request((i,), Sampling(max_new_tokens=n)) for i, n in enumerate(lengths)]
        found = run(engine, *requests)
        slots = model.given[0]
        assert slots.run_steps > sum(lengths) / 4
        if calm:
            assert slots.bounds == [None, None]
        else:
            assert slots.bounds[0] is None
            assert slots.bounds.count(8) > 8
            assert set(slots.bounds[1:-4]) == {8}
        for key, request in enumerate(requests):
            assert found[key] == [drawn.token for drawn, _ in alone(model, request, 99)]


def test_right_drafts_save_passes_and_wrong_ones_cost_nothing_but_work() -> None:
    request = Request((4, 5, 6), Sampling(max_new_tokens=30, temperature=1.0, seed=2))
    passes = {}
    for wrong in (1, 99):
        model, guesser = HashModel(), Guesser(wrong, 6)
        expected = [drawn.token for drawn, _ in alone(model, request, 99)]
        guesser.answers[request.prompt] = expected
        engine = engine_of(model, drafter=guesser)
        assert run(engine, request)[0] == expected
        passes[wrong] = len(model.given[0].fed)
        engine.close()
        assert guesser.closed
        assert engine.stats.drafted > 0
        assert engine.stats.accepted == (0 if wrong == 1 else engine.stats.drafted)
        again = [feed.start for feeds in model.given[0].fed for feed in feeds]
        assert again == sorted(set(again)), "a position was fed twice"
        drafted = [len(feed.tokens) for feeds in model.given[0].fed[1:] for feed in feeds]
        assert sum(drafted) - len(drafted) == engine.stats.drafted
    assert passes[1] == 30
    assert passes[99] == 30 - engine.stats.accepted


def test_what_a_grammar_forces_takes_no_pass_of_its_own() -> None:
    model = HashModel()
    wish = Wish((4, 5, 6), Sampling(max_new_tokens=40), 0, (1, 24))
    engine = engine_of(model)
    found = run(engine, wish.request())[0]
    assert found == [drawn.token for drawn, _ in alone(model, wish.request(), 99)]
    # Every fourth token is forced; the very last of them has nothing drawn beside it.
    assert (len(found), engine.stats.accepted, engine.stats.steps) == (24, 5, 19)


def test_what_cannot_fit_is_refused_in_one_line() -> None:
    engine = engine_of(HashModel(), capacity=20)
    for prompt, message in (
        ((), "the prompt is empty"),
        ((1,) * 21, "the prompt has 21 tokens, this model takes 20"),
        ((80,), "token id 80, outside the vocabulary of 80"),
    ):
        with pytest.raises(BackendError, match=message):
            engine.submit(Request(prompt, Sampling()))
    with pytest.raises(BackendError, match="logit_bias holds token id 80"):
        engine.submit(Request((1,), Sampling(logit_bias=((80, 1.0),))))
    with pytest.raises(ConfigError, match="prefill_tokens must be at least 1"):
        engine_of(HashModel(), prefill_tokens=0)
    with pytest.raises(BackendError, match="1 to 96 tokens"):
        engine_of(HashModel(), capacity=97)
    assert not engine.busy


def test_a_prompt_that_fills_its_slot_gets_one_token() -> None:
    engine = engine_of(HashModel(), capacity=20)
    engine.submit(Request((1,) * 20, Sampling(max_new_tokens=5)))
    assert [event.finish_reason for event in engine.step()] == ["length"]
    assert not engine.busy


def test_leaving_and_closing_again_free_the_slots() -> None:
    model = HashModel()
    engine = engine_of(model)
    engine.submit(Request((1,), Sampling(max_new_tokens=9)))
    with engine:
        engine.step()
        engine.step()
        assert model.given[0].running
    assert model.given[0].closed
    assert not model.given[0].running
    engine.close()
