"""Scoring through the shared cache equals a plain full forward pass by transformers."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.errors import BackendError
from qwen2kit.generate.prefix import plan_scores
from qwen2kit.generate.prefix_pack import pack_steps
from tests.unit.torch.peers import SPECS, TOKENS, continued, ours, theirs

torch = pytest.importorskip("torch")


def _requests() -> list[ScoreRequest]:
    rng = np.random.default_rng(7)
    shared = tuple(rng.integers(0, 199, 40).tolist())
    requests = [ScoreRequest(shared[:30], (choice,)) for choice in (3, 9, 11, 190)]
    requests += [
        ScoreRequest(shared[:n], shared[n : n + m]) for n, m in ((1, 39), (20, 5), (31, 2))
    ]
    for _ in range(6):
        tokens = tuple(rng.integers(0, 199, 25).tolist())
        cut = int(rng.integers(1, 24))
        requests.append(ScoreRequest(tokens[:cut], tokens[cut:]))
    return requests


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("slices", ["whole", "sliced"])
@pytest.mark.parametrize("pack", [1, 7, 30, 256])
def test_scores_match_transformers(
    name: str, slices: str, pack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2kit_torch.score_budget.CPU_TOKENS", pack)
    if slices == "sliced":
        monkeypatch.setattr("qwen2kit_torch.score_budget._CPU_LOGITS", 3 * 199)
    peer, model = theirs(SPECS[name]), ours(SPECS[name])
    requests = [*_requests(), ScoreRequest(tuple(TOKENS), tuple(continued(peer, TOKENS, 6)))]
    scores = dict(model.score(requests))
    assert sorted(scores) == list(range(len(requests)))
    for index, request in enumerate(requests):
        tokens = torch.tensor([[*request.context, *request.continuation]])
        with torch.no_grad():
            logprobs = peer(tokens).logits[0, :-1].double().log_softmax(-1)
        wanted = tokens[0, len(request.context) :]
        tail = logprobs[len(request.context) - 1 :]
        expected = tail.gather(1, wanted[:, None]).sum().item()
        assert scores[index].logprob == pytest.approx(expected, abs=1e-4)
        assert scores[index].is_greedy == bool((tail.argmax(-1) == wanted).all())
    assert scores[len(requests) - 1].is_greedy


def test_nothing_to_score() -> None:
    assert list(ours(SPECS["tied"]).score([])) == []


@pytest.mark.parametrize("most", [1, 12, 40])
def test_out_of_memory_halves_the_budget_and_loses_nothing(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, requests = ours(SPECS["tied"]), _requests()
    expected = dict(model.score(requests))
    forward, sizes = model.module.forward_hidden, []

    def small(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        sizes.append(tokens.shape[1])
        if tokens.shape[1] > most and len(sizes) > 1:  # the first pass still finds memory
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens, **options)

    monkeypatch.setattr("qwen2kit_torch.score_budget.CPU_TOKENS", 64)
    monkeypatch.setattr(model.module, "forward_hidden", small)
    scores = list(model.score(requests))
    assert sorted(index for index, _ in scores) == list(range(len(requests)))
    assert max(sizes) > most >= sizes[-1]
    for index, found in scores:
        assert found.logprob == pytest.approx(expected[index].logprob, abs=1e-4)
        assert found.is_greedy == expected[index].is_greedy


def test_no_memory_at_all_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(SPECS["tied"])

    def full(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.module, "forward_hidden", full)
    with pytest.raises(BackendError, match="out of memory while scoring single tokens"):
        list(model.score(_requests()))


@pytest.mark.parametrize("window", [None, 5])
def test_ragged_rows_see_what_the_mask_shows(window: int | None) -> None:
    """Per run, keys are aligned at the end, as flash attention's causal mask is."""
    from qwen2kit_torch.score import ragged

    several = 0
    for pack in pack_steps(plan_scores(_requests()), 60):
        rows = ragged(pack, 0, len(pack.tokens), window, torch.device("cpu"))
        mask, keys = pack.visible(window), rows.keys
        width = mask.shape[1]
        order = torch.arange(width) if keys is None else keys
        for run in range(len(pack.paths)):
            queries = range(int(rows.query_starts[run]), int(rows.query_starts[run + 1]))
            path = order[rows.key_starts[run] : rows.key_starts[run + 1]].numpy()
            for place, query in enumerate(queries):
                end = len(path) - len(queries) + place + 1
                begin = 0 if window is None else max(0, end - window)
                assert set(path[begin:end]) == set(np.flatnonzero(mask[query]))
        several += len(pack.paths) > 1
    assert several


def test_the_budget_follows_the_memory() -> None:
    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.score_budget import within

    small, large = preset("qwen2-0.5b"), preset("qwen2-72b")
    free = 8 << 30
    assert within(10 * free, small, 2).tokens == 16384
    assert within(free, large, 2).tokens < within(free, small, 2).tokens
    for spec in (small, large):
        budget = within(free, spec, 2)
        cache = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * 2
        assert budget.tokens * (cache + 8 * spec.intermediate_size) < free
        assert budget.logits * spec.vocab_size * 4 < free / 4
        assert budget.keys * 4 * spec.num_key_value_heads * spec.head_dim < free / 4
        assert within(free // 2, spec, 2).tokens <= budget.tokens
    assert within(1, small, 2).tokens == 1
