"""Log-probabilities of continuations, with every shared prefix computed once.

Shape suffixes: T fed tokens, N scored positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.protocol import Score, ScoreRequest
from qwen2kit.generate.prefix import ScoreStep, Target, plan_scores
from qwen2kit_mlx.attention import Prompt
from qwen2kit_mlx.device_logits import LOGIT_ROWS, log_sum_exp
from qwen2kit_mlx.model import Decoder
from qwen2kit_mlx.passes import PREFILL_TOKENS
from qwen2kit_mlx.slot_store import SlotStore


def score(
    decoder: Decoder, requests: Sequence[ScoreRequest], device: mx.Device
) -> Iterator[tuple[int, Score]]:
    """Scores in the order of `plan_scores`; see `CompiledModel.score`."""
    store = SlotStore(decoder.spec, 1, decoder.dtype)
    try:
        for step in plan_scores(requests):
            rows = [t.first - step.first_scored + i for t in step.targets for i in _each(t)]
            tokens = [token for target in step.targets for token in target.tokens]
            with mx.stream(device):
                hidden_ND = _feed(decoder, store, step)
                logprobs, best = _look_up(decoder, hidden_ND, np.array(rows), np.array(tokens))
            start = 0
            for target in step.targets:
                own = slice(start, start + len(target.tokens))
                yield target.request, Score(float(logprobs[own].sum()), bool(best[own].all()))
                start = own.stop
    finally:
        store.drop()
        mx.clear_cache()


def _each(target: Target) -> range:
    return range(len(target.tokens))


def _feed(decoder: Decoder, store: SlotStore, step: ScoreStep) -> mx.array:
    """Run the step's tokens; residual stream ``[N, D]`` of the positions to be scored."""
    scored: list[mx.array] = []
    for start in range(0, len(step.feed), PREFILL_TOKENS):
        tokens = step.feed[start : start + PREFILL_TOKENS]
        attend = Prompt(decoder.heads, store, 0, step.keep + start, len(tokens))
        hidden_TD = decoder(mx.array([tokens], dtype=mx.int32), attend)
        if start + len(tokens) > step.first_scored:
            scored.append(hidden_TD[max(0, step.first_scored - start) :])
        mx.eval(store.arrays(), scored)
    return scored[0] if len(scored) == 1 else mx.concatenate(scored)


def _look_up(
    decoder: Decoder, hidden_ND: mx.array, rows: NDArray[np.int64], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """For each (row, token): its log-probability, and whether it is the row's argmax."""
    logprobs = np.empty(len(rows), dtype=np.float64)
    best = np.empty(len(rows), dtype=np.bool_)
    for start in range(0, hidden_ND.shape[0], LOGIT_ROWS):
        inside = np.flatnonzero((rows >= start) & (rows < start + LOGIT_ROWS))
        if not len(inside):
            continue
        logits_NV = decoder.logits(hidden_ND[start : start + LOGIT_ROWS]).astype(mx.float32)
        row, token = mx.array(rows[inside] - start), mx.array(tokens[inside])
        logprob = logits_NV[row, token] - log_sum_exp(logits_NV)[row]
        logprobs[inside] = np.asarray(logprob)
        best[inside] = np.asarray(mx.argmax(logits_NV, axis=-1)[row] == token)
    return logprobs, best
