"""What is done to each row between matrix products, and the choice of the next token, in Triton.

Shapes: R rows, D hidden, H query heads, K kv heads, C head_dim, F ffn, V vocabulary, B blocks of
the vocabulary.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def embed(tokens, table, x, step, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``x[r] = table[tokens[r]]``; the first row counts the step. Grid (R,)."""
    row = tl.program_id(0)
    token = tl.load(tokens + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(table + token * WIDTH + column, mask=column < WIDTH)
    tl.store(x + row * WIDTH + column, value, mask=column < WIDTH)
    if row == 0:
        tl.store(step, tl.load(step) + 1)


@triton.jit
def add_and_norm(
    x, added, weight, normed, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """``x += added`` (if ``ADDS``), then ``normed = weight * x / rms(x)``; all ``[R, D]``."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * WIDTH + column
    value = tl.load(x + place, mask=inside, other=0.0)
    if ADDS:
        value = value.to(tl.float32) + tl.load(added + place, mask=inside, other=0.0)
        value = value.to(x.dtype.element_ty)
        tl.store(x + place, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(normed + place, (wide * scale).to(factor.dtype) * factor, mask=inside)


@triton.jit
def drift(anchor, less, sin, HALF: tl.constexpr):
    """What a rotation adds to both halves of ``anchor``; ``less`` is its cosines less one."""
    first, second = tl.load(anchor).to(tl.float32), tl.load(anchor + HALF).to(tl.float32)
    change = tl.load(less).to(tl.float32)
    return first * change - second * sin, second * change + first * sin


@triton.jit
def rotated(
    first, second, head, position, place, cos, sin, less, anchor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, ANCHORED: tl.constexpr,
):  # fmt: skip
    """Columns ``place`` of both halves of a query or key after its rotation; values stay. If
    ``ANCHORED``, keys get the `drift` of ``anchor`` ``[K * C]``."""
    HALF: tl.constexpr = SIZE // 2
    if head < HEADS + KV_HEADS:
        across = tl.load(cos + position * SIZE + place).to(tl.float32)
        along = tl.load(sin + position * SIZE + HALF + place).to(tl.float32)
        turned = first * across - second * along
        second = second * across + first * along
        first = turned
        if ANCHORED:  # noqa: SIM102 (settled when compiled)
            if head >= HEADS:
                add = anchor + (head - HEADS) * SIZE + place
                more, other = drift(add, less + position * SIZE + place, along, HALF)
                first, second = first + more, second + other
    return first, second


@triton.jit
def rotate_and_store(
    joint, cos, sin, less, anchor, slots, positions, queries, keys, values, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, ANCHORED: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys of ``joint`` ``[R, (H + 2K) * C]``; keys and values go into their
    slots, queries into ``[R, H * C]``. Rows of negative slots are skipped. For ``less`` and
    ``anchor`` see `rotated`. Grid (R, H + 2K)."""
    HALF: tl.constexpr = SIZE // 2
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, HALF)
    slot = tl.load(slots + row)
    position = tl.load(positions + row)
    at = joint + (row * (HEADS + 2 * KV_HEADS) + head) * SIZE + place
    first, second = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
    first, second = rotated(
        first, second, head, position, place, cos, sin, less, anchor,
        HEADS, KV_HEADS, SIZE, ANCHORED,
    )  # fmt: skip
    dtype = queries.dtype.element_ty
    if head < HEADS:
        to = queries + (row * HEADS + head) * SIZE + place
        tl.store(to, first.to(dtype))
        tl.store(to + HALF, second.to(dtype))
    elif slot >= 0:
        kv_head = (head - HEADS) % KV_HEADS
        cell = ((slot * KV_HEADS + kv_head).to(tl.int64) * capacity + position) * SIZE + place
        if head < HEADS + KV_HEADS:
            tl.store(keys + cell, first.to(dtype))
            tl.store(keys + cell + HALF, second.to(dtype))
        else:
            tl.store(values + cell, first.to(dtype))
            tl.store(values + cell + HALF, second.to(dtype))


@triton.jit
def silu_times(joint, gated, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """``gated[r] = silu(joint[r, :F]) * joint[r, F:]``. Grid (R, blocks of F)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HEIGHT
    at = joint + row * (2 * HEIGHT) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + HEIGHT, mask=inside, other=0.0).to(tl.float32)
    dtype = gated.dtype.element_ty
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(gated + row * HEIGHT + column, (active * up).to(dtype), mask=inside)


@triton.jit
def best_of_blocks(
    logits, limit, best, best_ids, HEIGHT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Largest logit below ``limit`` of every block of the vocabulary, and its id; NaN counts as
    infinite. ``[R, V]`` into ``[R, BLOCKS]``, grid (BLOCKS, R)."""
    row = tl.program_id(1)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (ids < HEIGHT) & (ids < tl.load(limit))
    value = tl.load(logits + row.to(tl.int64) * HEIGHT + ids, mask=inside, other=-float("inf"))
    value = value.to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    highest = tl.max(value, 0)
    first = tl.min(tl.where((value == highest) & inside, ids, HEIGHT), 0)
    tl.store(best + row * BLOCKS + tl.program_id(0), highest)
    tl.store(best_ids + row * BLOCKS + tl.program_id(0), first)


@triton.jit
def go_on(
    row, found, slots, positions, tokens, history, step, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """``found`` (-1: no id) becomes the row's next token, is kept in ``history`` ``[STEPS, R]``,
    and the row's position grows."""
    tl.store(history + (tl.load(step) - 1) % STEPS * ROWS + row, found)
    tl.store(tokens + row, tl.maximum(found, 0))
    if tl.load(slots + row) >= 0:
        tl.store(positions + row, tl.load(positions + row) + 1)


@triton.jit
def choose(
    best, best_ids, slots, positions, tokens, history, step,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The smallest id of the largest logit becomes the row's next token, and its position grows.

    ``history`` ``[STEPS, R]`` keeps the ids, -1 where the logits were no numbers. Grid (R,).
    """
    if PDL:
        cuda.gdc_wait()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_ids = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, BLOCKS, BLOCK):
        inside = start + column < BLOCKS
        at = row * BLOCKS + start + column
        value = tl.load(best + at, mask=inside, other=-float("inf"))
        ids = tl.load(best_ids + at, mask=inside, other=2147483647)
        higher = value > top
        top_ids = tl.where(higher, ids, top_ids)
        top = tl.where(higher, value, top)
    highest = tl.max(top, 0)
    first = tl.min(tl.where(top == highest, top_ids, 2147483647), 0)
    good = (highest > -float("inf")) & (highest < float("inf"))
    found = tl.where(good, first, -1)
    go_on(row, found, slots, positions, tokens, history, step, ROWS, STEPS)
