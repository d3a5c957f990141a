"""Causal attention of many new tokens to the slots they were just stored in, in Triton.

Flash attention over ragged pieces: every tile of queries belongs to one slot, and reads that slot
from its first visible position to the tile's last one. Shapes: T tokens, H query heads, K kv
heads, S slots, C head_dim.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tiles(
    queries, keys, values, tiles, out, capacity, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax attention of every token to positions up to its own; grid (tiles, H).

    Args:
        queries: ``[T, H * C]``, rotated.
        keys, values: ``[S, K, capacity, C]``, the tokens' own included.
        tiles: int32 ``[tiles, 4]``: first token, tokens (up to ``ROWS``), slot, first position.
        out: ``[T, H * C]``.
        scale: ``C ** -0.5``.
    """
    head = tl.program_id(1)
    # The last tiles of a long piece see most keys: they go first.
    tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 4
    token, count = tl.load(tile), tl.load(tile + 1)
    slot, position = tl.load(tile + 2), tl.load(tile + 3)
    index = tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    mine = ((token + index[:, None]).to(tl.int64) * HEADS + head) * SIZE + column[None, :]
    query = tl.load(queries + mine, mask=(index < count)[:, None], other=0.0)
    kv_head = head // (HEADS // KV_HEADS)
    base = (slot * KV_HEADS + kv_head).to(tl.int64) * capacity * SIZE
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, SIZE), tl.float32)
    seen = position + index
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position + 1 - WINDOW, 0) // BLOCK * BLOCK
    # Whole blocks that all rows see, then those at the diagonal; a window's edge is checked too.
    whole = begin
    if WINDOW == 0:
        whole = (position + 1) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            place = base + (start + tl.arange(0, BLOCK))[:, None] * SIZE + column[None, :]
            key, value = tl.load(keys + place), tl.load(values + place)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * _LOG2E)
            peak, total, mixed = _absorb(score, value, peak, total, mixed)
    end = position + count
    for start in range(whole, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = base + at[:, None] * SIZE + column[None, :]
        key = tl.load(keys + place, mask=(at < end)[:, None], other=0.0)
        value = tl.load(values + place, mask=(at < end)[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * _LOG2E)
        visible = at[None, :] <= seen[:, None]
        if WINDOW > 0:
            visible = visible & (at[None, :] > seen[:, None] - WINDOW)
        # Finite, because a row may see nothing of a block.
        score = tl.where(visible, score, -1e30)
        peak, total, mixed = _absorb(score, value, peak, total, mixed)
    done = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + mine, done, mask=(index < count)[:, None])


@triton.jit
def _absorb(score, value, peak, total, mixed):
    """One more block of keys in the running softmax."""
    higher = tl.maximum(peak, tl.max(score, 1))
    share = tl.exp2(score - higher[:, None])
    shrunk = tl.exp2(peak - higher)
    total = total * shrunk + tl.sum(share, 1)
    product = tl.dot(share.to(value.dtype), value, input_precision="ieee")
    return higher, total, mixed * shrunk[:, None] + product
