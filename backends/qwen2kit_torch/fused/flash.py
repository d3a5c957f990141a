"""FlashAttention 4 (PyPI's ``flash-attn-4``) as differentiable operators.

Its kernels, in CuTe DSL, are compiled for the device when a process first needs them, in seconds.
They are called through operators of our own: torch's ``activate_flash_attention_impl("FA4")``
replaces attention in the whole process, inference included, and up to torch 2.13 expects another
return value than 4.0.0b36 gives.

The backward pass adds up the gradients of queries, and with grouped heads those of keys and
values, in the order in which blocks finish, unless ``torch.use_deterministic_algorithms`` is on.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, C head_dim. A layout is either
``[B, T, heads, C]`` or, for segments laid end to end, ``[sum of lengths, heads, C]``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: tuple[Tensor, Tensor] | None = None,
    longest: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention, in the layout of ``q`` and contiguous; the softmax scale is ``C ** -0.5``.

    The last query sees the last key: where keys outnumber queries they are aligned at the end.
    Nothing is copied if heads and their C values lie side by side.

    Args:
        q, k, v: bfloat16 or float16 on CUDA.
        starts: where segments of queries and of keys begin, int32 ``[segments + 1]``; segments may
            be empty. Without, ``q`` is ``[B, T, H, C]``.
        longest: bound on a segment's queries and keys; goes with ``starts``.
        window: keys a query sees, itself included; None is all.
    """
    query_starts, key_starts = starts or (None, None)
    out: Tensor = _forward(q, k, v, query_starts, key_starts, longest, window)[0]
    return out


@cache
def interface() -> Any:
    """The package's module of kernels. Raises ImportError or OSError where it cannot be loaded."""
    return import_module("flash_attn.cute.interface")


@torch.library.custom_op(
    "qwen2kit::flash_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? query_starts, Tensor? key_starts, "
    "SymInt? longest, int? window) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    longest: int | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output, and float32 log-sum-exp ``[B, H, T]`` or ``[H, sum of lengths]``."""
    out, lse, *_ = interface()._flash_attn_fwd(
        q, k, v, return_lse=True, **_segments(query_starts, key_starts, longest), **_mask(window)
    )
    return out, lse


@torch.library.custom_op(
    "qwen2kit::flash_attention_backward",
    mutates_args=(),
    schema="(Tensor slope, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? query_starts, Tensor? key_starts, SymInt? longest, int? window) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    slope: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    longest: int | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    interface()._flash_attn_bwd(
        q,
        k,
        v,
        out,
        slope,
        lse,
        dq=dq,
        dk=dk,
        dv=dv,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_segments(query_starts, key_starts, longest),
        **_mask(window),
    )
    return dq, dk, dv


def _segments(
    query_starts: Tensor | None, key_starts: Tensor | None, longest: int | None
) -> dict[str, Any]:
    if query_starts is None:
        return {}
    return {
        "cu_seqlens_q": query_starts,
        "cu_seqlens_k": key_starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def _mask(window: int | None) -> dict[str, Any]:
    """The package counts the keys left of a query, without itself."""
    return {"causal": True, "window_size_left": None if window is None else window - 1}


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    longest: int | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    statistics = q.new_empty(q.shape[:-1], dtype=torch.float32).mT
    return _empty(q), _empty(statistics)


@_backward.register_fake
def _(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest, ctx.window = inputs
    q, k, v, query_starts, key_starts = tensors
    ctx.save_for_backward(q, k, v, *output, query_starts, key_starts)


def _gradients(ctx: Any, slope: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    found = _backward(slope, *ctx.saved_tensors, ctx.longest, ctx.window)
    return *found, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_remember)
