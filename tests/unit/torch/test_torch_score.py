"""Scoring through the shared cache equals a plain full forward pass by transformers."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.backend.protocol import ScoreRequest
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
@pytest.mark.parametrize("pack", [1, 30, 256])
def test_scores_match_transformers(
    name: str, slices: str, pack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2kit_torch.score._CPU_PACK", pack)
    if slices == "sliced":
        monkeypatch.setattr("qwen2kit_torch.prefill.TOKENS_PER_PASS", 7)
        monkeypatch.setattr("qwen2kit_torch.prefill._LOGITS_PER_SLICE", 3 * 199)
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
