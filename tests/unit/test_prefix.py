"""The prefix planner: replay its steps with a toy cache and compare with the requests."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.generate.prefix import plan_scores

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
            assert 0 <= step.first_scored <= target.first
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
            assert step.first_scored == 0
        previous = tokens
    assert fed == len(nodes) + rescored


def test_choices_with_one_token_answers_are_one_step() -> None:
    context = tuple(range(100))
    requests = [ScoreRequest(context, (answer,)) for answer in (7, 8, 9, 10)]
    (step,) = plan_scores(requests)
    assert (step.keep, step.feed, step.first_scored) == (0, context, 99)
    assert {t.request for t in step.targets} == {0, 1, 2, 3}


def test_few_shot_prefix_is_computed_once() -> None:
    shots = tuple(range(1000))
    requests = [ScoreRequest((*shots, 5000 + i), (1, 2)) for i in range(20)]
    assert sum(len(step.feed) for step in plan_scores(requests)) == 1000 + 20 * 2


def test_no_requests_no_steps() -> None:
    assert list(plan_scores([])) == []
