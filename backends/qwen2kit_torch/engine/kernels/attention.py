"""Attention of single queries to their slots, keys divided over many programs, in Triton.

Flash decoding: every program takes a range of keys for all query heads that share them, and the
last one to finish joins what the ranges gave. Lengths are read on the device, so the launch is the
same for all of them. Shapes: R rows, H query heads, K kv heads, G = H / K, S slots, C head_dim.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    queries, keys, values, slots, positions, out, parts, weights, arrived, capacity, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax attention of row ``r`` to positions up to its own in its slot; grid (SPLITS, K, R).

    Args:
        queries: ``[R, H * C]``, rotated.
        keys, values: ``[S, K, capacity, C]``.
        slots, positions: int32 ``[R]``; a negative slot is skipped.
        out: ``[R, H * C]``.
        parts, weights: float32 ``[R, K, SPLITS, GROUP, C]`` and ``[R, K, SPLITS, GROUP, 2]``.
        arrived: int32 ``[R, K]``, zeros; left as zeros.
        scale: ``C ** -0.5``.

    ``WINDOW`` is the sliding window's length, 0 for none; ``GROUP`` is G rounded up to a power of
    two of at least 16.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    end = tl.load(positions + row) + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    step = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
    active = tl.cdiv(end - begin, step)
    if PDL:
        cuda.gdc_wait()
    if (slot >= 0) & (split < active):
        first = begin + split * step
        _attend_range(
            queries, keys, values, out, parts, weights, arrived, capacity, scale,
            row, kv_head, slot, split, active, first, tl.minimum(first + step, end),
            HEADS, KV_HEADS, SIZE, SPLITS, BLOCK, GROUP,
        )  # fmt: skip


@triton.jit
def _attend_range(
    queries, keys, values, out, parts, weights, arrived, capacity, scale,
    row, kv_head, slot, split, active, first, end,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    SHARED: tl.constexpr = HEADS // KV_HEADS
    dtype = out.dtype.element_ty
    member = tl.arange(0, GROUP)
    column = tl.arange(0, SIZE)
    base = (slot * KV_HEADS + kv_head).to(tl.int64) * capacity * SIZE
    mine = (row * HEADS + kv_head * SHARED + member[:, None]) * SIZE + column[None, :]
    query = tl.load(queries + mine, mask=(member < SHARED)[:, None], other=0.0)
    peak = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, SIZE), tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        place = base + at[:, None] * SIZE + column[None, :]
        key = tl.load(keys + place, mask=inside[:, None], other=0.0)
        value = tl.load(values + place, mask=inside[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * _LOG2E)
        score = tl.where(inside[None, :], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        shrunk = tl.exp2(peak - higher)
        total = total * shrunk + tl.sum(share, 1)
        product = tl.dot(share.to(dtype), value, input_precision="ieee")
        mixed = mixed * shrunk[:, None] + product
        peak = higher
    if active == 1:
        done = (mixed / total[:, None]).to(dtype)
        tl.store(out + mine, done, mask=(member < SHARED)[:, None])
    else:
        pair = row * KV_HEADS + kv_head
        own = (pair * SPLITS + split) * GROUP + member
        tl.store(parts + own[:, None] * SIZE + column[None, :], mixed)
        tl.store(weights + own * 2, peak)
        tl.store(weights + own * 2 + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == active - 1:
            tl.debug_barrier()
            _join(
                parts, weights, out, row, kv_head, active,
                HEADS, KV_HEADS, SIZE, SPLITS, GROUP,
            )  # fmt: skip
            tl.store(arrived + pair, 0)


@triton.jit
def _join(
    parts, weights, out, row, kv_head, active,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weighted mean of the ranges; past L1, which may hold what the last step left there."""
    SHARED: tl.constexpr = HEADS // KV_HEADS
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, SIZE)
    there = split < active
    for member in range(SHARED):
        own = ((row * KV_HEADS + kv_head) * SPLITS + split) * GROUP + member
        peak = tl.load(weights + own * 2, mask=there, other=-float("inf"), cache_modifier=".cg")
        total = tl.load(weights + own * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        part = tl.load(
            parts + own[:, None] * SIZE + column[None, :],
            mask=there[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        share = tl.exp2(peak - tl.max(peak, 0))
        mean = tl.sum(part * share[:, None], 0) / tl.sum(total * share, 0)
        place = (row * HEADS + kv_head * SHARED + member) * SIZE + column
        tl.store(out + place, mean.to(out.dtype.element_ty))
