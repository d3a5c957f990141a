"""The prefix planner: replay its steps with a toy cache and compare with the requests."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.generate.prefix import plan_scores
from qwen2kit.generate.prefix_pack import pack_steps

few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
request_lists = st.lists(st.builds(ScoreRequest, few_tokens, few_tokens), max_size=12)


def inputs_of(request: ScoreRequest) -> tuple[int, ...]:
    return (request.context + request.continuation)[:-1]


@settings(max_examples=400, deadline=None)
@given(request_lists)
def test_replaying_the_steps_scores_every_request_once(requests: list[ScoreRequest]) -> None:
    cache: tuple[int, ...] = ()
    scored: list[int] = []
    for step in plan_scores(requests):
        assert step.feed
        assert step.keep <= len(cache)
        cache = cache[: step.keep] + step.feed
        for target in step.targets:
            request = requests[target.request]
            assert cache == inputs_of(request)
            assert target.tokens == request.continuation
            # The logits of the position before each continuation token are among those fed.
            position = step.keep + target.first
            assert position == len(request.context) - 1
            assert target.first >= 0
            assert target.first + len(target.tokens) == len(step.feed)
            scored.append(target.request)
    assert sorted(scored) == list(range(len(requests)))


@settings(max_examples=400, deadline=None)
@given(request_lists)
def test_nothing_is_fed_twice_but_positions_to_score(requests: list[ScoreRequest]) -> None:
    nodes = {inputs_of(r)[: n + 1] for r in requests for n in range(len(inputs_of(r)))}
    previous: tuple[int, ...] = ()
    fed = rescored = 0
    for step in plan_scores(requests):
        tokens = previous[: step.keep] + step.feed
        common = next(
            (i for i, (a, b) in enumerate(zip(previous, tokens, strict=False)) if a != b),
            min(len(previous), len(tokens)),
        )
        fed += len(step.feed)
        rescored += common - step.keep
        if common > step.keep:
            assert min(target.first for target in step.targets) == 0
        previous = tokens
    assert fed == len(nodes) + rescored


def test_choices_with_one_token_answers_are_one_step() -> None:
    context = tuple(range(100))
    requests = [ScoreRequest(context, (answer,)) for answer in (7, 8, 9, 10)]
    (step,) = plan_scores(requests)
    assert (step.keep, step.feed) == (0, context)
    assert {t.first for t in step.targets} == {99}
    assert {t.request for t in step.targets} == {0, 1, 2, 3}


def test_few_shot_prefix_is_computed_once() -> None:
    shots = tuple(range(1000))
    requests = [ScoreRequest((*shots, 5000 + i), (1, 2)) for i in range(20)]
    assert sum(len(step.feed) for step in plan_scores(requests)) == 1000 + 20 * 2


def test_no_requests_no_steps() -> None:
    assert list(plan_scores([])) == []


@settings(max_examples=400, deadline=None)
@given(request_lists, st.integers(1, 30), st.none() | st.integers(1, 4))
def test_packed_tokens_see_their_own_path_and_nothing_else(
    requests: list[ScoreRequest], budget: int, window: int | None
) -> None:
    slots: list[tuple[int, int]] = []  # (token, position) of everything the last pass could see
    scored: list[int] = []
    for pack in pack_steps(plan_scores(requests), budget):
        trunk = [slots[slot] for slot in pack.kept]
        assert [position for _, position in trunk] == list(range(len(trunk)))
        fed = list(zip(pack.tokens.tolist(), pack.positions.tolist(), strict=True))
        slots = trunk + fed
        assert pack.is_plain or len(fed) <= budget
        seen = pack.visible()
        windowed = pack.visible(window)
        for row, place in enumerate(pack.positions.tolist()):
            path = sorted((slots[s][1], slots[s][0]) for s in np.flatnonzero(seen[row]))
            assert [position for position, _ in path] == list(range(place + 1))
            last = pack.starts[np.searchsorted(pack.starts, row, side="right")] - 1
            whole = sorted((slots[s][1], slots[s][0]) for s in np.flatnonzero(seen[last]))
            assert whole[: place + 1] == path
        for start, end, path in zip(pack.starts, pack.starts[1:], pack.paths, strict=False):
            assert [slots[slot][1] for slot in path] == list(range(len(path)))
            assert set(path) == set(np.flatnonzero(seen[end - 1]))
            assert path[-(end - start) :].tolist() == [*range(len(trunk) + start, len(trunk) + end)]
        for target in pack.targets:
            request = requests[target.request]
            path = inputs_of(request)
            for offset, token in enumerate(target.tokens):
                row = target.first + offset
                place = len(request.context) - 1 + offset
                visible = sorted((slots[s][1], slots[s][0]) for s in np.flatnonzero(seen[row]))
                assert visible == list(enumerate(path[: place + 1]))
                near = {slots[s][1] for s in np.flatnonzero(windowed[row])}
                low = 0 if window is None else max(0, place - window + 1)
                assert near == set(range(low, place + 1))
                assert token == request.continuation[offset]
            scored.append(target.request)
    assert sorted(scored) == list(range(len(requests)))


@settings(max_examples=200, deadline=None)
@given(request_lists, st.integers(1, 40))
def test_paths_keep_within_their_bound(requests: list[ScoreRequest], keys: int) -> None:
    packs = list(pack_steps(plan_scores(requests), 30, keys))
    assert all(pack.is_plain or sum(map(len, pack.paths)) <= keys for pack in packs)
    fed = sum(len(step.feed) for step in plan_scores(requests))
    assert sum(len(pack.tokens) for pack in packs) == fed


@settings(max_examples=200, deadline=None)
@given(request_lists, st.integers(1, 30))
def test_packs_feed_what_the_steps_feed(requests: list[ScoreRequest], budget: int) -> None:
    steps = list(plan_scores(requests))
    packs = list(pack_steps(steps, budget))
    fed = [token for pack in packs for token in pack.tokens]
    assert fed == [token for step in steps for token in step.feed]
