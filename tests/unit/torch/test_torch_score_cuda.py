"""On a CUDA device: ragged flash attention over packs scores as masks do."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.backend.protocol import ScoreRequest
from tests.unit.torch.peers import SPECS, ours

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _requests() -> list[ScoreRequest]:
    rng = np.random.default_rng(3)
    header = tuple(rng.integers(0, 199, 60).tolist())
    requests = []
    for _ in range(40):
        question = header[: int(rng.integers(20, 60))] + tuple(rng.integers(0, 199, 17).tolist())
        requests += [ScoreRequest(question, (choice,)) for choice in (5, 6, 7)]
        requests.append(ScoreRequest(question, tuple(rng.integers(0, 199, 9).tolist())))
    return [*requests, ScoreRequest((1,), tuple(rng.integers(0, 199, 230).tolist()))]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens", [16, 100, 16384])
def test_flash_attention_over_packs_follows_float32(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2kit_torch.score_budget._GPU_TOKENS", tokens)
    requests = _requests()
    exact = dict(ours(SPECS[name], device="cuda", dtype="float32").score(requests))
    found = dict(ours(SPECS[name], device="cuda", dtype="bfloat16").score(requests))
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        near = 0.03 * len(request.continuation) ** 0.5 + 0.02
        assert found[index].logprob == pytest.approx(exact[index].logprob, abs=near)
