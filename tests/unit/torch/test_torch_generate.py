"""Generation: equal to transformers, independent of batch mates, ended for the right reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2kit.generate.sampling import Sampling
from tests.conftest import small_spec
from tests.unit.torch.peers import SPECS, TOKENS, continued, ours, theirs, tokens_of

torch = pytest.importorskip("torch")

RAGGED = [TOKENS[:9], TOKENS[3:4], TOKENS, TOKENS[5:14]]


@pytest.mark.parametrize("name", SPECS)
def test_greedy_matches_transformers(name: str) -> None:
    actual = tokens_of(ours(SPECS[name]).generate([TOKENS], Sampling(max_new_tokens=40)))
    assert actual[0] == continued(theirs(SPECS[name]), TOKENS, 40)


def test_repetition_penalty_matches_transformers() -> None:
    expected = continued(theirs(SPECS["tied"]), TOKENS, 30, repetition_penalty=1.3)
    sampling = Sampling(max_new_tokens=30, repetition_penalty=1.3)
    actual = tokens_of(ours(SPECS["tied"]).generate([TOKENS], sampling))
    assert actual[0] == expected


@pytest.mark.parametrize("name", ["tied", "untied", "window"])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}])
def test_batch_mates_do_not_matter(name: str, changes: dict[str, Any]) -> None:
    model = ours(SPECS[name])
    free = tokens_of(model.generate(RAGGED, Sampling(max_new_tokens=24, **changes)))
    # Rows reach these at different steps, so that the batch shrinks on the way.
    stops = (free[0][1], free[2][6])
    sampling = Sampling(max_new_tokens=24, stop_token_ids=stops, **changes)
    together = tokens_of(model.generate(RAGGED, sampling))
    for index in range(len(RAGGED)):
        # A row's random stream depends on its index, which the fillers keep.
        alone = tokens_of(model.generate([[1]] * index + [RAGGED[index]], sampling))
        assert together[index] == alone[index]
    assert len({len(tokens) for tokens in together.values()}) > 1


@pytest.mark.parametrize("name", ["tied", "window"])
def test_sliced_prefill_equals_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(SPECS[name])
    sampling = Sampling(max_new_tokens=12)
    expected = tokens_of(model.generate(RAGGED, sampling))
    monkeypatch.setattr("qwen2kit_torch.prefill.TOKENS_PER_PASS", 12)
    assert tokens_of(model.generate(RAGGED, sampling)) == expected


def test_cache_growth_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(SPECS["tied"])
    sampling = Sampling(max_new_tokens=30)
    expected = tokens_of(model.generate(RAGGED, sampling))
    monkeypatch.setattr("qwen2kit_torch.kv_cache._BLOCK", 4)
    monkeypatch.setattr("qwen2kit_torch.generate._HEADROOM", 1)
    assert tokens_of(model.generate(RAGGED, sampling)) == expected


def test_sampling_follows_the_seed() -> None:
    model = ours(SPECS["tied"])

    def run(seed: int) -> dict[int, list[int]]:
        return tokens_of(
            model.generate(RAGGED, Sampling(max_new_tokens=16, temperature=1.0, seed=seed))
        )

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_stop_token_is_emitted_last() -> None:
    model = ours(SPECS["tied"])
    free = tokens_of(model.generate([TOKENS], Sampling(max_new_tokens=20)))[0]
    stop = free[2]
    events = list(model.generate([TOKENS], Sampling(max_new_tokens=20, stop_token_ids=(stop,))))
    assert [event.token for event in events] == free[: free.index(stop) + 1]
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == "stop"


def test_length_ends_at_both_limits() -> None:
    model = ours(small_spec(max_position_embeddings=24))
    for prompt, new, expected in (
        (TOKENS[:4], 5, 5),
        (TOKENS, 50, 4),
        ([*TOKENS, 1, 2, 3, 4], 9, 1),
    ):
        events = list(model.generate([prompt], Sampling(max_new_tokens=new)))
        assert len(events) == expected
        assert events[-1].finish_reason == "length"


def test_vocab_limit_and_logprobs() -> None:
    model = ours(SPECS["untied"])
    free = tokens_of(model.generate([TOKENS], Sampling(max_new_tokens=6)))[0]
    limit = max(free)
    for extra in ({}, {"logprobs": True}):
        sampling = Sampling(max_new_tokens=6, vocab_limit=limit, **extra)
        events = list(model.generate([TOKENS], sampling))
        assert max(event.token for event in events) < limit
    logits = model.logits(TOKENS)[-1, :limit].astype(np.float64)
    expected = logits.max() - np.log(np.exp(logits).sum())
    assert events[0].logprob == pytest.approx(expected, abs=1e-5)


def test_no_prompts_no_events() -> None:
    assert list(ours(SPECS["tied"]).generate([], Sampling())) == []


def test_iterating_leaves_the_callers_grad_mode_alone() -> None:
    events = ours(SPECS["tied"]).generate([TOKENS], Sampling(max_new_tokens=3))
    for _ in events:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    events.close()
