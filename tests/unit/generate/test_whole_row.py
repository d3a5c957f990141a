"""The draw from a whole row against sorting the row and walking through it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen2kit import Sampling
from qwen2kit.errors import NonFiniteLogits
from qwen2kit.generate.whole_row import draw_from_row


def walked(scores: NDArray[np.float32], sampling: Sampling, point: float) -> int:
    """As the definition says, token by token."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.temperature == 0:
        return order[0]
    order = [token for token in order if scores[token] > -np.inf]
    if 0 < sampling.top_k < len(order):
        least = scores[order[sampling.top_k - 1]]
        order = [token for token in order if scores[token] >= least]
    best = float(scores[order[0]])
    weights = [np.exp((float(scores[token]) - best) / sampling.temperature) for token in order]
    sums = np.cumsum(weights)
    end = len(order)
    if sampling.top_p < 1:
        end = 1 + int(np.argmax(sums >= sampling.top_p * sums[-1]))
    return order[int(np.argmax(sums[:end] > point * sums[end - 1]))]


@settings(max_examples=400, deadline=None)
@given(
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0, 2.0, 50.0]),
        top_k=st.sampled_from([0, 0, 1, 5, 20, 100, 399, 400, 1000]),
        top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.8, 0.95, 0.999]),
    ),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1e-4, 0.3, 2.0, 8.0, 300.0]),
    grid=st.sampled_from([0.0, 0.0, 0.5, 4.0]),
    masked=st.sampled_from([0, 0, 100, 399]),
    offset=st.sampled_from([0.0, 0.0, -1000.0, 1000.0]),
)
def test_the_token_that_a_walk_finds(
    sampling: Sampling, seed: int, scale: float, grid: float, masked: int, offset: float
) -> None:
    chance = np.random.default_rng(seed)
    values = chance.standard_normal(400) * scale
    scores = (np.round(values / grid) * grid if grid else values).astype(np.float32)
    signs = np.sign(chance.standard_normal(400))  # -0.0 too
    scores = (scores * signs + offset).astype(np.float32)
    scores[chance.permutation(400)[:masked]] = -np.inf
    for point in (*chance.random(6), 0.0):
        assert draw_from_row(scores, sampling, point) == walked(scores, sampling, point)
    assert np.isfinite(scores[draw_from_row(scores, sampling, 1 - 2.0**-53)])  # as rounding has it


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_told(value: float) -> None:
    row = np.full(9, -np.inf, dtype=np.float32)
    row[4] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteLogits):
            draw_from_row(row, Sampling(temperature=temperature), 0.5)


def test_shares_are_those_of_the_softmax() -> None:
    scores = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    points = (np.arange(20_000) + 0.5) / 20_000
    found = [draw_from_row(scores, Sampling(temperature=0.5), point) for point in points]
    weights = np.exp(scores.astype(np.float64) / 0.5)
    share = np.bincount(found, minlength=50) / len(points)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=1e-4)
