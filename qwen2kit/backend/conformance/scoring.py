"""Cases about log-probabilities of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from qwen2kit.backend.conformance.case import Case, require, require_raises
from qwen2kit.backend.conformance.models import (
    DENSE,
    TOLERANCE,
    UNTIED,
    WINDOW,
    loaded,
    reference_continuation,
    reference_logprobs,
    tokens,
)
from qwen2kit.backend.protocol import Backend
from qwen2kit.backend.values import Score, ScoreRequest
from qwen2kit.errors import BackendError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.spec.model import ModelSpec

_CLEAR_MARGIN = 1e-3


def _score(backend: Backend, spec: ModelSpec, requests: Sequence[ScoreRequest]) -> None:
    found = dict(loaded(backend, spec).score(requests))
    require(
        sorted(found) == list(range(len(requests))),
        f"scored indices {sorted(found)}, expected 0..{len(requests) - 1}",
    )
    for index, request in enumerate(requests):
        _compare(f"request {index}", spec, request, found[index])


def _compare(what: str, spec: ModelSpec, request: ScoreRequest, found: Score) -> None:
    ids = (*request.context, *request.continuation)
    rows = reference_logprobs(spec, ids[:-1])[len(request.context) - 1 :]
    chosen = np.array([row[token] for row, token in zip(rows, request.continuation, strict=True)])
    tolerance = TOLERANCE * len(chosen)
    error = abs(found.logprob - chosen.sum())
    require(
        error <= tolerance,
        f"{what}: log-probability {found.logprob:.6f}, expected {chosen.sum():.6f}",
    )
    behind = rows.max(axis=-1) - chosen
    if ((behind == 0) | (behind > _CLEAR_MARGIN)).all():
        expected = bool((behind == 0).all())
        require(found.is_greedy is expected, f"{what}: is_greedy is {found.is_greedy}")


def _single_token(backend: Backend) -> None:
    contexts = [tokens(length, seed=length) for length in (1, 7, 30)]
    _score(backend, UNTIED, [ScoreRequest(context, (5,)) for context in contexts])


def _multi_token(backend: Backend, spec: ModelSpec) -> None:
    requests = [
        ScoreRequest(tokens(length, seed=length), tokens(count, seed=90 + count))
        for length, count in ((1, 1), (1, 9), (12, 4), (40, 30), (3, 60))
    ]
    _score(backend, spec, requests)


def _shared_prefixes(backend: Backend) -> None:
    shots = tokens(40)
    requests = [ScoreRequest((*shots, i), (i + 1, i + 2, i + 3)) for i in range(6)]
    requests += [ScoreRequest((*shots, 0), (answer,)) for answer in (11, 12, 13, 14)]
    requests += [ScoreRequest(shots[:20], shots[20:30]), ScoreRequest(shots[:20], shots[20:24])]
    requests += [ScoreRequest(shots[:1], shots[1:]), requests[0], requests[0]]
    order = np.random.default_rng(0).permutation(len(requests))
    _score(backend, UNTIED, [requests[i] for i in order])


def _greedy_flag(backend: Backend) -> None:
    prompt = tokens(8)
    best = reference_continuation(UNTIED, prompt, Sampling(max_new_tokens=5))
    other = (*best[:4], (best[4] + 1) % UNTIED.vocab_size)
    found = dict(
        loaded(backend, UNTIED).score([ScoreRequest(prompt, best), ScoreRequest(prompt, other)])
    )
    require(found[0].is_greedy is True, "the greedy continuation is not called greedy")
    require(found[1].is_greedy is False, "a continuation with another last token is called greedy")


def _nothing(backend: Backend) -> None:
    require(list(loaded(backend, UNTIED).score([])) == [], "no requests gave scores")


def _too_long(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    limit = UNTIED.max_position_embeddings
    fits = ScoreRequest(tokens(limit - 5), tokens(5, seed=1))
    require(len(list(model.score([fits]))) == 1, "a request of exactly the limit is not scored")
    long = ScoreRequest(tokens(limit), tokens(5, seed=1))
    require_raises(BackendError, lambda: list(model.score([long])), "request beyond the limit")


CASES = (
    Case("score/single-token", _single_token),
    Case("score/multi-token-tied", partial(_multi_token, spec=DENSE["tied"])),
    Case("score/multi-token-untied", partial(_multi_token, spec=UNTIED)),
    Case("score/yarn", partial(_multi_token, spec=DENSE["yarn"])),
    Case(
        "score/sliding-window",
        partial(_multi_token, spec=WINDOW),
        lambda has: has.sliding_window,
    ),
    Case("score/shared-prefixes", _shared_prefixes),
    Case("score/greedy-flag", _greedy_flag),
    Case("score/no-requests", _nothing),
    Case("score/too-long", _too_long),
)
