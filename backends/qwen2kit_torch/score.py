"""Log-likelihood scoring over one KV cache, every shared prefix computed once.

Shapes: T fed tokens, N scored positions, M continuation tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.backend.protocol import Score, ScoreRequest
from qwen2kit.generate.prefix import plan_scores
from qwen2kit.generate.prefix_pack import Pack, pack_steps
from qwen2kit_torch.attention import Attend, Visibility
from qwen2kit_torch.kv_cache import KVCache
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.prefill import TOKENS_PER_PASS, feed, logits_in_slices

# A CPU is busy with this many tokens; masks make larger packs dearer there.
_CPU_PACK = 256


def score(model: Qwen2, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
    """Scores of valid ``requests`` in the order of `plan_scores`."""
    weight = model.model.embed_tokens.weight
    longest = max(len(r.context) + len(r.continuation) - 1 for r in requests)
    budget = _CPU_PACK if weight.device.type == "cpu" else TOKENS_PER_PASS
    with torch.inference_mode():
        cache = KVCache(
            model.spec, rows=1, device=weight.device, dtype=weight.dtype, capacity=longest + budget
        )
    for pack in pack_steps(plan_scores(requests), budget):
        yield from _run(model, cache, pack)


@torch.inference_mode()
def _run(model: Qwen2, cache: KVCache, pack: Pack) -> Iterator[tuple[int, Score]]:
    cache.keep_slots(pack.kept.tolist())
    wanted = np.concatenate([np.arange(t.first, t.first + len(t.tokens)) for t in pack.targets])
    scored, rows = np.unique(wanted, return_inverse=True)
    tokens = np.array([token for target in pack.targets for token in target.tokens])
    logprobs, best = _look_up(model, _hidden(model, cache, pack, scored), rows, tokens)
    start = 0
    for target in pack.targets:
        own = slice(start, start + len(target.tokens))
        start = own.stop
        yield target.request, Score(float(logprobs[own].sum()), bool(best[own].all()))


def _hidden(model: Qwen2, cache: KVCache, pack: Pack, scored: NDArray[np.int64]) -> Tensor:
    """Feed the pack; final hidden states ``[N, D]`` of the ``scored`` positions."""
    device = model.model.embed_tokens.weight.device
    tokens_1T = torch.from_numpy(pack.tokens).to(device)[None]
    if not pack.is_plain:
        positions = torch.from_numpy(pack.positions).to(device)[None]
        hidden_1TD = model.forward_hidden(
            tokens_1T, positions=positions, cache=cache, visible=_visible(model, pack, device)
        )
        return hidden_1TD[0, torch.from_numpy(scored).to(device)]
    parts = []
    begin = 0
    for part_1TD in feed(model, tokens_1T, cache):
        end = begin + part_1TD.shape[1]
        inside = scored[(scored >= begin) & (scored < end)] - begin
        parts.append(part_1TD[0, torch.from_numpy(inside).to(device)])
        begin = end
    return torch.cat(parts)


def _visible(model: Qwen2, pack: Pack, device: torch.device) -> dict[int | None, Attend]:
    return {
        window: Visibility(
            torch.from_numpy(pack.visible(window)).to(device)[None, None], causal=False
        )
        for window in set(model.windows)
    }


def _look_up(
    model: Qwen2,
    hidden_ND: Tensor,
    rows: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """For each of M (row of ``hidden_ND``, token): its log-probability, and whether it is the
    row's argmax."""
    logprobs = np.empty(len(rows))
    best = np.empty(len(rows), dtype=np.bool_)
    for start, logits_NV in logits_in_slices(model, hidden_ND):
        inside = np.flatnonzero((rows >= start) & (rows < start + len(logits_NV)))
        row = torch.from_numpy(rows[inside] - start).to(logits_NV.device)
        token = torch.from_numpy(tokens[inside]).to(logits_NV.device)
        logprob = logits_NV[row, token] - logits_NV.logsumexp(-1)[row]
        logprobs[inside] = logprob.double().cpu().numpy()
        best[inside] = (logits_NV.argmax(-1)[row] == token).cpu().numpy()
    return logprobs, best
