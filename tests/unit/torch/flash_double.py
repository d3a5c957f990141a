"""What FlashAttention 4's interface (4.0.0b36) computes, in plain PyTorch, for machines without it.

The backward pass starts from the output and the log-sum-exp of the forward pass, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size_left: int | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    assert causal
    assert return_lse
    out = torch.empty(q.shape, dtype=q.dtype)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.empty(shape)
    for queries, keys, place in _places(q, k, cu_seqlens_q, cu_seqlens_k):
        _check_bounds(q[queries], k[keys], max_seqlen_q, max_seqlen_k)
        scores = _scores(q[queries], k[keys], window_size_left)
        lse[place] = scores.logsumexp(-1)
        out[queries] = _heads_last(scores.softmax(-1) @ _spread(v[keys], scores)).to(q.dtype)
    return out, lse, None, None, None


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    causal: bool = False,
    window_size_left: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, ...]:
    assert causal
    assert dq is not None
    assert dk is not None
    assert dv is not None
    for queries, keys, place in _places(q, k, cu_seqlens_q, cu_seqlens_k):
        scores = _scores(q[queries], k[keys], window_size_left)
        weights = (scores - lse[place][..., None]).exp()
        slope, values = _heads_first(dout[queries]), _spread(v[keys], scores)
        mean = (slope * _heads_first(out[queries])).sum(-1, keepdim=True)
        inner = weights * (slope @ values.mT - mean) * q.shape[-1] ** -0.5
        query, key = _heads_first(q[queries]), _spread(k[keys], scores)
        dq[queries] = _heads_last(inner @ key).to(q.dtype)
        dk[keys] = _gathered(inner.mT @ query, k).to(k.dtype)
        dv[keys] = _gathered(weights.mT @ slope, v).to(v.dtype)
    return dq, dk, dv


def _places(
    q: Tensor, k: Tensor, query_starts: Tensor | None, key_starts: Tensor | None
) -> Iterator[tuple[Any, Any, Any]]:
    """Where each row or segment lies in queries, in keys and in the log-sum-exp."""
    if query_starts is None or key_starts is None:
        assert k.shape[:2] == q.shape[:2]
        yield from ((row, row, row) for row in range(len(q)))
        return
    assert query_starts.dtype == key_starts.dtype == torch.int32
    edges = (starts.tolist() for starts in (query_starts, key_starts))
    pairs = [list(pairwise(ends)) for ends in edges]
    for (start, stop), (key_start, key_stop) in zip(*pairs, strict=True):
        if stop > start:
            yield slice(start, stop), slice(key_start, key_stop), (slice(None), slice(start, stop))


def _check_bounds(q: Tensor, k: Tensor, most_q: int | None, most_k: int | None) -> None:
    for tensor, most in ((q, most_q), (k, most_k)):
        assert most is None or tensor.shape[0] <= most


def _scores(q: Tensor, k: Tensor, left: int | None) -> Tensor:
    """``[H, T, S]`` in float32, minus infinity where a query, aligned at the end, sees no key."""
    scores = _heads_first(q) @ _heads_first(k).repeat_interleave(q.shape[1] // k.shape[1], 0).mT
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    hidden = distance < 0 if left is None else (distance < 0) | (distance > left)
    return (scores * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).float()


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _spread(x: Tensor, scores: Tensor) -> Tensor:
    return _heads_first(x).repeat_interleave(len(scores) // x.shape[1], 0)


def _gathered(x: Tensor, like: Tensor) -> Tensor:
    """Sums of what the query heads of each group of ``like`` give, ``[S, K, C]``."""
    return _heads_last(x.unflatten(0, (like.shape[-2], -1)).sum(1))
