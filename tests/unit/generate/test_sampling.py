"""The sampler against transformers' logits processors, and its draws against the probabilities."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.generate.sampling import Sampler, Sampling


class Grid:
    """Stands in for the random numbers: always the same point of [0, 1)."""

    def __init__(self, point: float) -> None:
        self.point = point

    def __getitem__(self, index: int) -> float:
        return self.point


def distribution(logits: NDArray[np.float32], sampling: Sampling, prompt: list[int],
                 points: int = 4000) -> dict[int, float]:  # fmt: skip
    """Probability of every token, by walking the inverse CDF on a regular grid."""
    counts: Counter[int] = Counter()
    for index in range(points):
        sampler = Sampler(sampling, prompt)
        sampler._points = Grid((index + 0.5) / points)  # type: ignore[assignment]
        counts[sampler.draw(logits)[0]] += 1
    return {token: count / points for token, count in counts.items()}


def transformers_distribution(
    logits: NDArray[np.float32], sampling: Sampling, prompt: list[int]
) -> NDArray[np.float64]:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    ids, scores = torch.tensor([prompt]), torch.tensor(logits)[None]
    if sampling.repetition_penalty != 1:
        scores = process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = process.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = process.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = process.TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.double().softmax(-1)[0].numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.3, "top_p": 0.5},
        {"temperature": 2.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.8, "top_k": 8},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_equal_transformers(settings_: dict[str, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(40) * 2).astype(np.float32)
    prompt = [3, 3, 17, 5]
    sampling = Sampling(**settings_)  # type: ignore[arg-type]
    expected = transformers_distribution(logits, sampling, prompt)
    found = distribution(logits, sampling, prompt)
    visible = {int(token) for token in np.flatnonzero(expected > 1 / 2000)}
    assert visible <= set(found) <= set(np.flatnonzero(expected))
    for token in range(40):
        assert found.get(token, 0.0) == pytest.approx(expected[token], abs=2 / 4000)


@pytest.mark.parametrize(
    ("probabilities", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.5, 1),
        ([0.5, 0.25, 0.125, 0.125], 0.75, 2),
        ([0.5, 0.25, 0.125, 0.125], 0.7500001, 3),
        ([0.25, 0.5, 0.125, 0.125], 0.49, 1),
    ],
)
def test_top_p_boundary_is_that_of_transformers(
    probabilities: list[float], top_p: float, kept: int
) -> None:
    logits = np.log(np.array(probabilities, dtype=np.float32))
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assert len(distribution(logits, sampling, [0], 500)) == kept
    assert (transformers_distribution(logits, sampling, [0]) > 0).sum() == kept


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 2.0, -1.0], dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    expected = transformers_distribution(logits, sampling, [0])
    assert set(distribution(logits, sampling, [0], 500)) == set(np.flatnonzero(expected))
    assert (expected > 0).sum() == 4


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0.8, seed=7), [])
    draws = 20_000
    counts = Counter(sampler.draw(logits)[0] for _ in range(draws))
    weights = np.exp(logits.astype(np.float64) / 0.8)
    expected = draws * weights / weights.sum()
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(5))
    assert chi_square < 18.47  # 0.1 % point of chi-square with 4 degrees of freedom


def test_seed_and_stream_decide_the_draws() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draws(seed: int, stream: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [1, 2], stream)
        return [sampler.draw(logits)[0] for _ in range(20)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, stream)) for seed in (0, 1) for stream in (0, 1)}) == 4


def test_greedy_takes_the_first_maximum() -> None:
    logits = np.array([1.0, 5.0, 5.0, 2.0], dtype=np.float32)
    assert Sampler(Sampling(), []).draw(logits).token == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vocab_limit_hides_padding_rows(temperature: float) -> None:
    logits = np.array([0.0, 0.1, 9.0, 9.0], dtype=np.float32)
    sampling = Sampling(temperature=temperature, vocab_limit=2, repetition_penalty=1.1)
    sampler = Sampler(sampling, [3, 2])
    assert {sampler.draw(logits)[0] for _ in range(50)} <= {0, 1}


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = np.array([2.0, 1.9, 1.8, -5.0], dtype=np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.2), [0])
    assert [sampler.draw(logits)[0] for _ in range(3)] == [1, 2, 0]


def test_logprob_is_of_the_unfiltered_softmax() -> None:
    logits = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    sampling = Sampling(temperature=0.1, top_k=1, repetition_penalty=2.0, logprobs=True)
    token, logprob, _ = Sampler(sampling, [2]).draw(logits)
    assert token == 1
    assert logprob == pytest.approx(2 - math.log(sum(math.exp(x) for x in (1, 2, 3))), abs=1e-9)


def test_logits_are_not_modified() -> None:
    logits = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    logits.flags.writeable = False
    Sampler(Sampling(temperature=1.0, repetition_penalty=1.5), [0, 1, 2]).draw(logits)


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = np.array([1.0, 3.0, 2.0], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert Sampler(Sampling(temperature=1e-30), []).draw(logits)[0] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_an_error(temperature: float, bad: float) -> None:
    logits = np.full(4, bad, dtype=np.float32)
    with pytest.raises(BackendError, match="NaN or infinite"):
        Sampler(Sampling(temperature=temperature), []).draw(logits)


def test_one_nan_among_many_is_an_error() -> None:
    logits = np.array([1.0, np.nan, 3.0], dtype=np.float32)
    with pytest.raises(BackendError, match="NaN"):
        Sampler(Sampling(temperature=1.0, top_k=2), []).draw(logits)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan},
        {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": math.nan}, {"repetition_penalty": 0.0}, {"seed": -1}, {"seed": 1 << 64},
        {"vocab_limit": 0},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_plain_greedy_is_recognised() -> None:
    assert Sampling().is_plain_greedy
    assert not Sampling(temperature=0.5).is_plain_greedy
    assert not Sampling(repetition_penalty=1.1).is_plain_greedy
    assert not Sampling(logprobs=True).is_plain_greedy


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=50),
    st.floats(0.05, 3), st.integers(0, 60), st.floats(0.01, 1), st.integers(0, 99),
)  # fmt: skip
def test_a_draw_is_always_an_allowed_token(
    values: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = np.array(values, dtype=np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    token = Sampler(sampling, []).draw(logits).token
    assert 0 <= token < len(values)
    if 0 < top_k <= len(values):
        assert logits[token] >= np.sort(logits)[-top_k]
