"""Log-likelihood scoring over one KV cache, every shared prefix computed once.

Shapes: T fed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen2kit.backend.protocol import Score, ScoreRequest
from qwen2kit.generate.prefix import ScoreStep, Target, plan_scores
from qwen2kit_torch.kv_cache import KVCache
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.prefill import feed, logits_in_slices


def score(model: Qwen2, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
    """Scores of valid ``requests`` in the order of `plan_scores`."""
    weight = model.model.embed_tokens.weight
    longest = max(len(r.context) + len(r.continuation) - 1 for r in requests)
    with torch.inference_mode():
        cache = KVCache(
            model.spec, rows=1, device=weight.device, dtype=weight.dtype, capacity=longest
        )
    for step in plan_scores(requests):
        yield from _run(model, cache, step)


@torch.inference_mode()
def _run(model: Qwen2, cache: KVCache, step: ScoreStep) -> list[tuple[int, Score]]:
    cache.truncate([step.keep])
    device = model.model.embed_tokens.weight.device
    sums = [0.0] * len(step.targets)
    greedy = [True] * len(step.targets)
    begin = 0
    for hidden_1TD in feed(model, torch.tensor([step.feed], device=device), cache):
        end = begin + hidden_1TD.shape[1]
        skip = max(step.first_scored - begin, 0)
        for offset, logits_TV in logits_in_slices(model, hidden_1TD[0, skip:]):
            normaliser = logits_TV.logsumexp(-1)
            best = logits_TV.argmax(-1)
            for index, target in enumerate(step.targets):
                found = _look_up(target, begin + skip + offset, logits_TV, normaliser, best)
                sums[index] += found[0]
                greedy[index] &= found[1]
        begin = end
    return [
        (target.request, Score(sums[index], greedy[index]))
        for index, target in enumerate(step.targets)
    ]


def _look_up(
    target: Target, begin: int, logits_TV: Tensor, normaliser_T: Tensor, best_T: Tensor
) -> tuple[float, bool]:
    """The target's share in one slice of positions that starts at ``begin``."""
    first = max(target.first, begin)
    last = min(target.first + len(target.tokens), begin + len(logits_TV))
    if first >= last:
        return 0.0, True
    positions = slice(first - begin, last - begin)
    wanted = torch.tensor(
        target.tokens[first - target.first : last - target.first], device=logits_TV.device
    )
    chosen = logits_TV[positions].gather(1, wanted[:, None])[:, 0]
    logprob = (chosen - normaliser_T[positions]).double().sum().item()
    return logprob, bool((best_T[positions] == wanted).all())
