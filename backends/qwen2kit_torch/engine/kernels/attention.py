"""Attention of single queries to their slots, keys divided over several programs, in Triton.

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
    SPLITS: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Softmax attention of row ``r`` to positions up to its own in its slot; grid (SPLITS, K, R).

    Keys before the row's own are asked for before the kernel waits for its predecessor, which
    writes only that one (where ``PDL``, there is one row).

    Args:
        queries: ``[R, H * C]``, rotated.
        keys, values: ``[S, K, capacity, C]``.
        slots, positions: int32 ``[R]``; a negative slot is skipped.
        out: ``[R, H * C]``.
        parts, weights: float32 ``[R, K, SPLITS, GROUP, C]`` and ``[R, K, SPLITS, GROUP, 2]``.
        arrived: int32 ``[R, K]``, zeros; left as zeros.
        scale: ``C ** -0.5``.

    ``n`` blocks of keys are divided into about ``sqrt(SPREAD * n)`` ranges, which balances the
    time of a range against that of joining them. ``WINDOW`` is the sliding window's length, 0 for
    none; ``GROUP`` is G rounded up to a power of two of at least 16.
    """
    SHARED: tl.constexpr = HEADS // KV_HEADS
    if PDL:
        cuda.gdc_launch_dependents()
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    end = tl.load(positions + row) + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    blocks = tl.cdiv(end - begin, BLOCK)
    ranges = tl.sqrt((blocks * SPREAD).to(tl.float32)).to(tl.int32)
    step = tl.cdiv(blocks, tl.minimum(tl.maximum(ranges, 1), SPLITS)) * BLOCK
    active = tl.cdiv(end - begin, step)
    if (slot >= 0) & (split < active):
        dtype = out.dtype.element_ty
        member = tl.arange(0, GROUP)
        column = tl.arange(0, SIZE)
        first = begin + split * step
        stop = tl.minimum(first + step, end)
        base = (slot * KV_HEADS + kv_head).to(tl.int64) * capacity * SIZE
        at = first + tl.arange(0, BLOCK)
        place = base + at[:, None] * SIZE + column[None, :]
        known = (at < tl.minimum(stop, end - 1))[:, None]
        key = tl.load(keys + place, mask=known, other=0.0)
        value = tl.load(values + place, mask=known, other=0.0)
        if PDL:
            cuda.gdc_wait()
        mine = (row * HEADS + kv_head * SHARED + member[:, None]) * SIZE + column[None, :]
        query = tl.load(queries + mine, mask=(member < SHARED)[:, None], other=0.0)
        newest = base + (end - 1) * SIZE + column
        own = (at == end - 1)[:, None]
        key = tl.where(own, tl.load(keys + newest)[None, :], key)
        value = tl.where(own, tl.load(values + newest)[None, :], value)
        peak = tl.full((GROUP,), -float("inf"), tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        mixed = tl.zeros((GROUP, SIZE), tl.float32)
        peak, total, mixed = _absorb(query, key, value, at < stop, scale, peak, total, mixed)
        for start in range(first + BLOCK, stop, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < stop
            place = base + at[:, None] * SIZE + column[None, :]
            key = tl.load(keys + place, mask=inside[:, None], other=0.0)
            value = tl.load(values + place, mask=inside[:, None], other=0.0)
            peak, total, mixed = _absorb(query, key, value, inside, scale, peak, total, mixed)
        if active == 1:
            done = (mixed / total[:, None]).to(dtype)
            tl.store(out + mine, done, mask=(member < SHARED)[:, None])
        else:
            pair = row * KV_HEADS + kv_head
            cell = (pair * SPLITS + split) * GROUP + member
            ours = member < SHARED
            tl.store(parts + cell[:, None] * SIZE + column[None, :], mixed, mask=ours[:, None])
            tl.store(weights + cell * 2, peak, mask=ours)
            tl.store(weights + cell * 2 + 1, total, mask=ours)
            tl.debug_barrier()
            if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == active - 1:
                tl.debug_barrier()
                joined = _joined(parts, weights, pair, active, SHARED, SIZE, SPLITS, GROUP)
                tl.store(out + mine, joined.to(dtype), mask=ours[:, None])
                tl.store(arrived + pair, 0)


@triton.jit
def _absorb(query, key, value, inside, scale, peak, total, mixed):
    """One more block of keys in the running softmax."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * _LOG2E)
    score = tl.where(inside[None, :], score, -float("inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    share = tl.exp2(score - higher[:, None])
    shrunk = tl.exp2(peak - higher)
    total = total * shrunk + tl.sum(share, 1)
    product = tl.dot(share.to(value.dtype), value, input_precision="ieee")
    return higher, total, mixed * shrunk[:, None] + product


@triton.jit
def _joined(
    parts, weights, pair, active,
    SHARED: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weighted mean of the ranges; past L1, which may hold what the last step left there."""
    TOGETHER: tl.constexpr = 4
    member = tl.arange(0, GROUP)
    column = tl.arange(0, SIZE)
    split = tl.arange(0, SPLITS)
    cell = (pair * SPLITS + split[:, None]) * GROUP + member[None, :]
    known = (split < active)[:, None] & (member < SHARED)[None, :]
    peaks = tl.load(weights + cell * 2, mask=known, other=-1e30, cache_modifier=".cg")
    totals = tl.load(weights + cell * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
    top = tl.max(peaks, 0)
    whole = tl.sum(totals * tl.exp2(peaks - top[None, :]), 0)
    mixed = tl.zeros((GROUP, SIZE), tl.float32)
    for begin in range(0, active, TOGETHER):
        for turn in tl.static_range(TOGETHER):
            there = (member < SHARED) & (begin + turn < active)
            own = (pair * SPLITS + begin + turn) * GROUP + member
            peak = tl.load(weights + own * 2, mask=there, other=-1e30, cache_modifier=".cg")
            part = tl.load(
                parts + own[:, None] * SIZE + column[None, :],
                mask=there[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            mixed += part * tl.exp2(peak - top)[:, None]
    return mixed / whole[:, None]
