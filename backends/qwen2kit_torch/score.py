"""Log-likelihood scoring over one KV cache, every shared prefix computed once.

Shapes: T fed tokens, N scored positions, M continuation tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
from qwen2kit_torch.score_budget import Budget, budget_of
from qwen2kit_torch.train.segments import VarlenAttend

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def score(model: Qwen2, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
    """Scores of valid ``requests``, each once, in the order of `plan_scores`.

    When memory runs out, what is not answered yet is planned again with half the budget.

    Raises:
        BackendError: there is not even memory for one token.
    """
    budget = budget_of(model)
    left = list(range(len(requests)))
    while left:
        done: set[int] = set()
        try:
            for place, found in _score(model, [requests[index] for index in left], budget):
                done.add(place)
                yield left[place], found
        except torch.OutOfMemoryError:
            budget = budget.halved()
        left = [index for place, index in enumerate(left) if place not in done]


def _score(
    model: Qwen2, requests: Sequence[ScoreRequest], budget: Budget
) -> Iterator[tuple[int, Score]]:
    weight = model.model.embed_tokens.weight
    longest = max(len(r.context) + len(r.continuation) - 1 for r in requests)
    with torch.inference_mode():
        cache = KVCache(
            model.spec,
            device=weight.device,
            dtype=weight.dtype,
            capacity=longest + min(budget.tokens, sum(len(r.context) for r in requests)),
        )
    pending: _Answers | None = None
    for pack in pack_steps(plan_scores(requests), budget.tokens, budget.keys):
        answers = _run(model, cache, pack, budget)
        if pending is not None:  # read while the device works on the next pack
            yield from pending.read()
        pending = answers
    if pending is not None:
        yield from pending.read()


@dataclass(frozen=True, slots=True)
class _Answers:
    """M looked-up tokens, still on the device.

    Attributes:
        pack: whose tokens they are.
        logprobs: float64 ``[M]``.
        best: bool ``[M]``, whether the token is the row's argmax.
    """

    pack: Pack
    logprobs: Tensor
    best: Tensor

    def read(self) -> Iterator[tuple[int, Score]]:
        """Each request's score."""
        return self.pack.scores(self.logprobs.cpu().numpy(), self.best.cpu().numpy())


@torch.inference_mode()
def _run(model: Qwen2, cache: KVCache, pack: Pack, budget: Budget) -> _Answers:
    cache.keep_slots(pack.kept.tolist())
    wanted = pack.lookups()
    rows, tokens = wanted.rows, wanted.tokens
    hidden_ND = torch.cat(list(_hidden(model, cache, pack, wanted.positions, budget.tokens)))
    logprobs = torch.empty(len(rows), dtype=torch.float64, device=hidden_ND.device)
    best = torch.empty(len(rows), dtype=torch.bool, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), budget.logits):
        logits_NV = model.head(hidden_ND[start : start + budget.logits]).float()
        inside = np.flatnonzero((rows >= start) & (rows < start + len(logits_NV)))
        place, row, token = (
            _on(logits_NV.device, x) for x in (inside, rows[inside] - start, tokens[inside])
        )
        logprobs[place] = (logits_NV[row, token] - logits_NV.logsumexp(-1)[row]).double()
        best[place] = logits_NV.argmax(-1)[row] == token
    return _Answers(pack, logprobs, best)


def _hidden(
    model: Qwen2, cache: KVCache, pack: Pack, scored: NDArray[np.int64], step: int
) -> Iterator[Tensor]:
    """Feed the pack; final hidden states of the ``scored`` positions, ``[N, D]`` in parts.

    A pack of one run may be longer than ``step`` tokens, and is fed in pieces.
    """
    device = model.model.embed_tokens.weight.device
    tokens_1T, positions_1T = (_on(device, x)[None] for x in (pack.tokens, pack.positions))
    size = step if pack.is_plain else len(pack.tokens)
    for start in range(0, len(pack.tokens), size):
        end = min(start + size, len(pack.tokens))
        hidden_1TD = model.forward_hidden(
            tokens_1T[:, start:end],
            positions=positions_1T[:, start:end],
            cache=cache,
            visible=attention(model, pack, start, end, device),
        )
        inside = scored[(scored >= start) & (scored < end)] - start
        yield hidden_1TD[0, _on(device, inside)]


def attention(
    model: Qwen2, pack: Pack, start: int, end: int, device: torch.device
) -> Mapping[int | None, Attend] | None:
    """What tokens ``start`` to ``end`` of a pack see, for every window length in use.

    Flash attention takes runs as ragged rows, each with the keys of its path. Elsewhere a mask
    says it; a single run needs none (None).
    """
    windows = set(model.windows)
    if device.type == "cuda" and model.model.embed_tokens.weight.dtype in _FLASH_DTYPES:
        return {window: ragged(pack, start, end, window, device) for window in windows}
    if pack.is_plain:
        return None
    return {
        window: Visibility(_on(device, pack.visible(window))[None, None], causal=False)
        for window in windows
    }


def ragged(
    pack: Pack, start: int, end: int, window: int | None, device: torch.device
) -> VarlenAttend:
    """Runs of a pack (or tokens ``start`` to ``end`` of a single one) as rows of their own."""
    if pack.is_plain:
        lengths = np.array([len(pack.kept) + end])
        return VarlenAttend(
            _on(device, np.array([0, end - start], dtype=np.int32)),
            _on(device, np.array([0, lengths[0]], dtype=np.int32)),
            None,
            int(lengths.max()),
            window,
        )
    lengths = np.array([len(path) for path in pack.paths])
    return VarlenAttend(
        _on(device, pack.starts.astype(np.int32)),
        _on(device, np.cumsum([0, *lengths]).astype(np.int32)),
        _on(device, np.concatenate(pack.paths)),
        int(lengths.max()),
        window,
    )


def _on(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
