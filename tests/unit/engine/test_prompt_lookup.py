"""Guesses from the text itself, against a search written the slow way; acceptance, theorem 3.8."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2kit.engine.acceptance import Acceptance
from qwen2kit.engine.drafting import Unfinished
from qwen2kit.engine.prompt_lookup import PromptLookup
from qwen2kit.engine.request import Request
from qwen2kit.errors import ConfigError
from qwen2kit.generate.sampling import Sampler, Sampling


def _propose(drafter: PromptLookup, tokens: list[int], limit: int = 4) -> tuple[int, ...]:
    sampler = Sampler(Sampling(), tokens)
    (guess,) = drafter.propose([Unfinished(0, tokens, limit, sampler)])
    return guess


def _begin(**options: int) -> PromptLookup:
    drafter = PromptLookup(**options)
    drafter.begin(0, Request((1,), Sampling()))
    return drafter


def _slowly(tokens: list[int], shortest: int, longest: int, count: int) -> tuple[int, ...]:
    for size in range(longest, shortest - 1, -1):
        ending = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == ending:
                text = list(tokens)
                for i in range(count):  # what follows, its own copy included
                    text.append(text[end + i])
                return tuple(text[len(tokens) :])
    return ()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 3), st.integers(3, 6))
def test_guess_follows_the_latest_longest_match(
    tokens: list[int], shortest: int, longest: int
) -> None:
    drafter = _begin(longest=5, shortest_match=shortest, longest_match=longest)
    guess = _propose(drafter, tokens)
    assert guess == _slowly(tokens, shortest, longest, len(guess))
    assert len(guess) in (0, 4)
    assert bool(guess) == bool(_slowly(tokens, shortest, longest, 1))


def test_text_may_grow_and_be_long() -> None:
    drafter = _begin(longest=3)
    tokens = list(range(100, 5000))
    assert _propose(drafter, tokens) == ()
    tokens += [200, 201]
    assert _propose(drafter, tokens) == (202, 203, 204)
    tokens += [202, 7, 8, 9, 7, 8]
    assert _propose(drafter, tokens) == (9, 7, 8)


def test_wrong_guesses_become_short_and_right_ones_long() -> None:
    drafter = _begin(longest=16)
    tokens = [1, 2, 3, 4, 5] * 20
    assert len(_propose(drafter, tokens, 99)) > 3
    for _ in range(30):
        tokens.append(tokens[-5])
        guess = _propose(drafter, tokens, 99)
        tokens += guess
    assert len(guess) == 16
    random = np.random.default_rng(0)
    lengths = []
    for _ in range(60):
        tokens += [1, 2, int(random.integers(100, 1 << 30))]
        lengths.append(len(_propose(drafter, [*tokens, 1, 2], 99)))
        tokens += [1, 2]
    assert sum(lengths[-20:]) <= 10


def test_nothing_is_left_of_a_finished_request() -> None:
    drafter = _begin()
    drafter.forget(0)
    drafter.forget(0)
    drafter.begin(0, Request((1,), Sampling()))
    assert _propose(drafter, [5, 6, 5, 6]) == (5, 6, 5, 6)
    drafter.close()
    drafter.close()


def test_at_least_one_token() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        PromptLookup(0)


@pytest.mark.parametrize("rate", [0.3, 0.8])
@pytest.mark.parametrize("cost", [0.05, 0.3])
def test_length_is_the_best_in_a_simulation(rate: float, cost: float) -> None:
    """Tokens per time of every fixed length, drawn at random; the chosen one is near the top."""
    random = np.random.default_rng(1)

    def speed(length: int) -> float:
        right = random.random((40_000, max(length, 1))) < rate
        runs = np.cumprod(right, axis=1).sum(axis=1) if length else np.zeros(1)
        return float((runs.mean() + 1) / (1 + (0.2 + length * cost) * (length > 0)))

    acceptance = Acceptance(cost, 12, surcharge=0.2)
    tokens: list[int] = []
    for _ in range(400):
        guess = (1,) * acceptance.length(12)
        acceptance.remember(guess, tokens)
        wrong = [i for i in range(len(guess)) if random.random() > rate]
        tokens += [1] * (wrong[0] if wrong else len(guess)) + [0]
        acceptance.observe(tokens)
    speeds = [speed(length) for length in range(13)]
    assert abs(acceptance.rate - rate) < 0.3
    assert speeds[acceptance.length(12)] > 0.85 * max(speeds)
