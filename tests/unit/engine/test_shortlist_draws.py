"""Drawing from a shortlist gives what sorting the whole row gives, or says that it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen2kit.backend.slots import Edit, Shortlist
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.generate.edit import apply_edit, pack_mask, unpack_mask
from qwen2kit.generate.inverse_cdf import heads_of
from qwen2kit.generate.sampling import Drawn, Sampler, Sampling

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0, 2.0, 10.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 20, 63, 64, 65, 100, 300, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.8, 0.95, 0.999]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.5]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (9, -100.0))]),
    vocab_limit=st.sampled_from([None, 290, 70, 10]),
    seed=st.integers(0, 5),
    logprobs=st.booleans(),
    top_logprobs=st.sampled_from([0, 0, 3]),
)


def rows(seed: int, scale: float, grid: float) -> NDArray[np.float32]:
    """Logits ``[12, 300]``; a coarse ``grid`` makes ties."""
    values = np.random.default_rng(seed).standard_normal((12, 300)) * scale
    return (np.round(values / grid) * grid if grid else values).astype(np.float32)


def disturbed(short: Shortlist, seed: int) -> Shortlist:
    """As a device may give it: equal scores in another order, totals a little off."""
    rng = np.random.default_rng(seed)
    orders = [np.lexsort((rng.random(len(s)), -s)) for s in short.scores]
    ids = np.stack([row[order] for row, order in zip(short.ids, orders, strict=True)])
    scores = np.stack([row[order] for row, order in zip(short.scores, orders, strict=True)])
    raw = np.stack([row[order] for row, order in zip(short.raw, orders, strict=True)])
    total = short.total + rng.uniform(-5e-5, 5e-5, len(ids))
    return Shortlist(ids, scores, total, raw, short.raw_total)


def drawn(sampler: Sampler, shortlist: Shortlist, edit: Edit) -> Drawn | None:
    (head,) = heads_of(shortlist, [sampler.sampling])
    return sampler.draw_short(shortlist, head, 0, edit)


@settings(max_examples=400, deadline=None)
@given(
    sampling=SAMPLINGS,
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    grid=st.sampled_from([0.0, 0.0, 0.5, 4.0]),
    masked=st.sampled_from([None, 1, 30, 200]),
)
def test_the_same_tokens_as_the_whole_row(
    sampling: Sampling, seed: int, scale: float, grid: float, masked: int | None
) -> None:
    prompt = [3, 3, 17, 5, 280]
    whole, short = Sampler(sampling, prompt, 1), Sampler(sampling, prompt, 1)
    mask = None
    if masked is not None:
        allowed = np.zeros(300, dtype=bool)
        below = sampling.vocab_limit or 300
        allowed[np.random.default_rng(seed).permutation(below)[:masked]] = True
        mask = pack_mask(allowed)
    for index, row in enumerate(rows(seed, scale, grid)):
        edit = short.edit(mask)
        listed = HostLogits(row[None]).shortlist(sampling.shortlist_size, [edit])
        found = drawn(short, disturbed(listed, index), edit) or short.draw(row, edit)
        expected = whole.draw(row, whole.edit(mask))
        assert found.token == expected.token
        assert np.isfinite(apply_edit(row, edit)[found.token])
        if sampling.reports:
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
            equals = grid or not scale  # whose order is open
            assert equals or [i for i, _ in found.top] == [i for i, _ in expected.top]
            assert [p for _, p in found.top] == pytest.approx(
                [p for _, p in expected.top], abs=1e-5
            )


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"top_k": 20, "top_p": 0.8}, 1.0),
        ({"top_p": 0.9}, 0.9),
        ({}, 0.85),
        ({"repetition_penalty": 1.1, "top_k": 50}, 1.0),
        ({"top_k": 100}, 1.0),
    ],
    ids=str,
)
def test_whole_rows_are_seldom_needed(changes: dict[str, Any], least: float) -> None:
    """On logits as peaked as a language model's."""
    sampling = Sampling(temperature=0.7, **changes)
    sampler, asked = Sampler(sampling, [1, 2, 3]), 0
    logits = np.random.default_rng(0).gumbel(size=(400, 5000)).astype(np.float32) * 2
    for row in logits:
        edit = sampler.edit()
        listed = HostLogits(row[None]).shortlist(sampling.shortlist_size, [edit])
        if drawn(sampler, listed, edit) is None:
            asked += 1
            sampler.draw(row, edit)
    assert 1 - asked / len(logits) >= least


def test_a_wrong_total_would_show() -> None:
    """The tail's mass matters: with a total that leaves it out, other tokens are drawn."""
    sampling = Sampling(temperature=1.0)
    whole, short = Sampler(sampling, []), Sampler(sampling, [])
    found, expected = [], []
    for row in rows(0, 1.0, 0.0).repeat(20, axis=0):
        edit = short.edit()
        listed = HostLogits(row[None]).shortlist(64, [edit])
        wrong = replace(listed, total=np.log(np.exp(listed.scores.astype(float)).sum(axis=1)))
        found.append((drawn(short, wrong, edit) or short.draw(row, edit)).token)
        expected.append(whole.draw(row).token)
    assert found != expected


def test_a_fork_draws_the_same_and_changes_nothing() -> None:
    sampling = Sampling(temperature=1.0, frequency_penalty=0.7, repetition_penalty=1.2, seed=3)
    logits = rows(1, 1.0, 0.0)
    sampler, untouched = Sampler(sampling, [1, 2]), Sampler(sampling, [1, 2])
    for step in range(6):
        twin = sampler.fork()
        ahead = [twin.draw(row).token for row in logits[step:]]
        tokens = [sampler.draw(logits[step]).token, untouched.draw(logits[step]).token]
        assert tokens == [ahead[0], ahead[0]]


def test_edits_ahead_are_those_of_the_draws_to_come() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=1.0, logit_bias=((7, 2.0),))
    sampler, row = Sampler(sampling, [1]), rows(2, 1.0, 0.0)[0]
    ahead = [4, 4, 7, 250]
    edits = sampler.edits(ahead)
    for token, edit in zip([*ahead, None], edits, strict=True):
        np.testing.assert_array_equal(apply_edit(row, edit), apply_edit(row, sampler.edit()))
        if token is not None:
            sampler.accept(token)


def test_openai_penalties_and_bias() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as platform.openai.com/docs defines it."""
    sampling = Sampling(presence_penalty=0.25, frequency_penalty=0.5, logit_bias=((2, 1.5),))
    sampler, row = Sampler(sampling, [3]), np.array([1, 1, -1, 1, 0.9], dtype=np.float32)
    expected = row.astype(float) + np.array([0, 0, 1.5, 0, 0])
    counts = np.zeros(5)
    for _ in range(7):
        mu = expected - 0.5 * counts - 0.25 * (counts > 0)
        token = sampler.draw(row).token
        assert mu[token] == mu.max()
        counts[token] += 1
    assert counts[2] == 0 or counts.max() > 1


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_masks_survive_packing(bits: list[bool]) -> None:
    allowed = np.array(bits)
    packed = pack_mask(allowed)
    assert len(packed) == -(-len(bits) // 32)
    np.testing.assert_array_equal(unpack_mask(packed, len(bits)), allowed)
    for token, bit in enumerate(bits):
        assert bool(packed[token // 32] >> (token % 32) & 1) == bit
