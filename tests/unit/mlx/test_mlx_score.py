"""Scores with shared prefixes against the reference's log-softmax of whole sequences."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.reference import ReferenceModel
from tests.conftest import random_weights
from tests.unit.mlx.setup_mlx import KERNELS, SPECS, model


def requests() -> list[ScoreRequest]:
    """Shared contexts, one-token choices, duplicates, a lone token, a prefix of another."""
    rng = np.random.default_rng(2)
    context = tuple(rng.integers(0, 199, 20).tolist())
    other = (*context[:12], *rng.integers(0, 199, 6).tolist())
    long = tuple(rng.integers(0, 199, 17).tolist())
    return [
        ScoreRequest(context, (5,)),
        ScoreRequest(other, (7, 8, 9)),
        ScoreRequest(context, (6,)),
        ScoreRequest((3,), (4,)),
        ScoreRequest(context, long),
        ScoreRequest(context[:12], context[12:15]),
        ScoreRequest(context, (5,)),
        ScoreRequest((3,), long),
    ]


def expected(spec: ModelSpec, request: ScoreRequest) -> tuple[float, bool]:
    logits = ReferenceModel(spec, random_weights(spec)).logits(
        [*request.context, *request.continuation[:-1]]
    )[len(request.context) - 1 :]
    picked = logits[np.arange(len(logits)), list(request.continuation)]
    total = float((picked - np.logaddexp.reduce(logits, axis=-1)).sum())
    return total, list(np.argmax(logits, axis=-1)) == list(request.continuation)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["tied", "window"])
def test_scores_equal_the_reference(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and with feeds and logits cut into small pieces."""
    spec = SPECS[name]
    ours = model(spec, random_weights(spec), kernels)
    batch = requests()
    greedy = ReferenceModel(spec, random_weights(spec)).logits([3])[-1].argmax()
    batch.append(ScoreRequest((3,), (int(greedy),)))
    for pack, feed, rows in ((256, 2048, 128), (30, 2048, 128), (1, 3, 2)):
        monkeypatch.setattr("qwen2kit_mlx.score.CPU_PACK", pack)
        monkeypatch.setattr("qwen2kit_mlx.score.PREFILL_TOKENS", feed)
        monkeypatch.setattr("qwen2kit_mlx.score.LOGIT_ROWS", rows)
        got = dict(ours.score(batch))
        assert sorted(got) == list(range(len(batch)))
        for index, request in enumerate(batch):
            logprob, is_greedy = expected(spec, request)
            assert got[index].logprob == pytest.approx(logprob, abs=2e-4)
            assert got[index].is_greedy == is_greedy
        assert got[len(batch) - 1].is_greedy


def test_bad_requests_are_refused_at_once() -> None:
    spec = SPECS["tied"]
    ours = model(spec, random_weights(spec))
    good = ScoreRequest((1,), (2,))
    for bad, message in (
        (ScoreRequest((), (1,)), "at least one context"),
        (ScoreRequest((1,), ()), "at least one context"),
        (ScoreRequest((1,) * 200, (1,) * 58), "257 tokens"),
        (ScoreRequest((1,), (500,)), "token id 500"),
    ):
        with pytest.raises(BackendError, match=message):
            ours.score([good, bad])
    longest = ScoreRequest((1,) * 200, (1,) * 57)
    assert np.isfinite(dict(ours.score([longest]))[0].logprob)
