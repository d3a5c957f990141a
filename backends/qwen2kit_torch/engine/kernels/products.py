"""Matrix times one vector, with what comes before and after it, in Triton.

A token's time is that of reading every weight once, so each kernel reads a few rows of a matrix,
starts on them before it waits for the kernel before it (programmatic dependent launch: the weights
do not depend on it), and recomputes the norm of its input, which is small and in the L2 cache.
Shapes: D inputs, N rows of a matrix, H query heads, K kv heads, C head_dim, F ffn, V vocabulary.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from qwen2kit_torch.engine.kernels.packed import first_codes, packed_products
from qwen2kit_torch.engine.kernels.rows import rotated


@triton.jit
def first_tile(
    weight, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The first ``BLOCK`` columns (or bytes of codes) of ``rows`` of a matrix ``[N, WIDTH]``."""
    if BITS > 0:
        tile = first_codes(weight, rows, WIDTH, BLOCK, BITS)
    else:
        columns = tl.arange(0, BLOCK)
        at = weight + rows[:, None] * WIDTH + columns[None, :]
        inside = (columns < WIDTH)[None, :]
        tile = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def first_block(vector, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The first ``BLOCK`` values of ``[WIDTH]``, zeros beyond its end."""
    columns = tl.arange(0, BLOCK)
    return tl.load(vector + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def inverse_rms(x, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` of ``[WIDTH]``, in float32."""
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        part = tl.load(x + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)


@triton.jit
def products(
    tile, factor, weight, steps, rows, x, norm, scale,
    NORMED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """``weight[rows] @ x`` in float32, where ``x`` is first normalised if ``NORMED``.

    ``tile`` is `first_tile` and ``factor`` the first block of ``norm``; each further tile is asked
    for before the one before it is used. With ``BITS`` the weights are codes with ``steps`` (the
    scale and offset of every ``GROUP`` of inputs); without, those are not read.
    """
    if BITS > 0:
        out = packed_products(
            tile, weight, steps, rows, x, norm, scale, NORMED, WIDTH, BLOCK, BITS, GROUP
        )
    else:
        out = _dense_products(tile, factor, weight, rows, x, norm, scale, NORMED, WIDTH, BLOCK)
    return out


@triton.jit
def _dense_products(
    tile, factor, weight, rows, x, norm, scale,
    NORMED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    at = weight + rows[:, None] * WIDTH + columns[None, :]
    part = tl.load(x + columns, mask=columns < WIDTH, other=0.0)
    if NORMED:
        part = (part.to(tl.float32) * scale).to(factor.dtype) * factor
    total = tile.to(tl.float32) * part.to(tl.float32)[None, :]
    if BLOCK < WIDTH:
        tile = tl.load(
            at + BLOCK,
            mask=(BLOCK + columns < WIDTH)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        for start in range(BLOCK, WIDTH, BLOCK):
            following = tl.load(
                at + start + BLOCK,
                mask=(start + BLOCK + columns < WIDTH)[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            inside = start + columns < WIDTH
            part = tl.load(x + start + columns, mask=inside, other=0.0)
            if NORMED:
                factor = tl.load(norm + start + columns, mask=inside, other=0.0)
                part = (part.to(tl.float32) * scale).to(factor.dtype) * factor
            total += tile.to(tl.float32) * part.to(tl.float32)[None, :]
            tile = following
    return tl.sum(total, 1)


@triton.jit
def project_heads(
    x, norm, weight, steps, bias, cos, sin, less, anchor, slots, positions, queries, keys, values,
    capacity, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, ANCHORED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, joint q/k/v product with bias, rotation; keys and values go into the slot.

    Args:
        x: residual stream ``[D]``.
        weight, bias: ``[(H + 2K) * C, D]`` and ``[(H + 2K) * C]``.
        steps: of weights in ``BITS`` (see `products`).
        cos, sin: tables ``[positions, C]``, the first half of ``sin`` negated.
        less, anchor: if ``ANCHORED``, cosines less one and the keys' bias ``[K * C]``, which is
            missing from ``bias`` (see `rows.drift`).
        slots, positions: int32 ``[1]``; nothing is kept in a negative slot.
        queries: out, ``[H * C]``, rotated.
        keys, values: out, ``[S, K, capacity, C]``.
    """
    HALF: tl.constexpr = SIZE // 2
    PAIRS: tl.constexpr = ROWS // 2
    if PDL:
        cuda.gdc_launch_dependents()
    head = tl.program_id(0) // (HALF // PAIRS)
    begin = tl.program_id(0) % (HALF // PAIRS) * PAIRS
    index = tl.arange(0, ROWS)
    rows = head * SIZE + begin + index // 2 + index % 2 * HALF
    tile = first_tile(weight, rows, WIDTH, BLOCK, BITS, GROUP)
    factor = first_block(norm, WIDTH, BLOCK)
    added = tl.load(bias + rows).to(tl.float32)
    if PDL:
        cuda.gdc_wait()
    scale = inverse_rms(x, eps, WIDTH, BLOCK)
    out = (
        products(
            tile,
            factor,
            weight,
            steps,
            rows,
            x,
            norm,
            scale,
            True,
            WIDTH,
            BLOCK,
            BITS,
            GROUP,
        )
        + added
    )
    dtype = queries.dtype.element_ty
    first, second = tl.split(tl.reshape(out.to(dtype).to(tl.float32), (PAIRS, 2)))
    place = begin + tl.arange(0, PAIRS)
    position = tl.load(positions)
    slot = tl.load(slots)
    first, second = rotated(
        first, second, head, position, place, cos, sin, less, anchor,
        HEADS, KV_HEADS, SIZE, ANCHORED,
    )  # fmt: skip
    if head < HEADS:
        at = queries + head * SIZE + place
        tl.store(at, first.to(dtype))
        tl.store(at + HALF, second.to(dtype))
    elif slot >= 0:
        kind = (head - HEADS) // KV_HEADS
        row = (slot * KV_HEADS + (head - HEADS) % KV_HEADS).to(tl.int64) * capacity + position
        if kind == 0:
            tl.store(keys + row * SIZE + place, first.to(dtype))
            tl.store(keys + row * SIZE + place + HALF, second.to(dtype))
        else:
            tl.store(values + row * SIZE + place, first.to(dtype))
            tl.store(values + row * SIZE + place + HALF, second.to(dtype))


@triton.jit
def add_product(
    x, weight, steps, residual,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``residual += weight @ x`` for a matrix ``[HEIGHT, WIDTH]``."""
    if PDL:
        cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < HEIGHT
    rows = tl.minimum(rows, HEIGHT - 1)
    tile = first_tile(weight, rows, WIDTH, BLOCK, BITS, GROUP)
    if PDL:
        cuda.gdc_wait()
    dtype = residual.dtype.element_ty
    before = tl.load(residual + rows).to(tl.float32)
    out = products(tile, 1.0, weight, steps, rows, x, x, 1.0, False, WIDTH, BLOCK, BITS, GROUP)
    tl.store(residual + rows, (before + out.to(dtype).to(tl.float32)).to(dtype), mask=inside)


@triton.jit
def gate_up(
    x, norm, weight, steps, gated, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Norm, joint gate/up product (``[2F, D]``, gates first), ``silu(gate) * up`` into ``[F]``."""
    PAIRS: tl.constexpr = ROWS // 2
    if PDL:
        cuda.gdc_launch_dependents()
    index = tl.arange(0, ROWS)
    rows = tl.program_id(0) * PAIRS + index // 2
    rows = tl.minimum(rows, HEIGHT - 1) + index % 2 * HEIGHT
    tile = first_tile(weight, rows, WIDTH, BLOCK, BITS, GROUP)
    factor = first_block(norm, WIDTH, BLOCK)
    if PDL:
        cuda.gdc_wait()
    scale = inverse_rms(x, eps, WIDTH, BLOCK)
    out = products(
        tile, factor, weight, steps, rows, x, norm, scale, True, WIDTH, BLOCK, BITS, GROUP
    )
    dtype = gated.dtype.element_ty
    gate, up = tl.split(tl.reshape(out.to(dtype).to(tl.float32), (PAIRS, 2)))
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    place = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    tl.store(gated + place, (active * up).to(dtype), mask=place < HEIGHT)


@triton.jit
def head(
    x, norm, weight, logits, limit, best, best_ids, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REPEAT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Final norm, logits ``[V]``, and each program's largest one below ``limit`` with its id.

    A NaN counts as infinite, so that it is noticed.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    begin = tl.program_id(0) * (ROWS * REPEAT)
    index = tl.arange(0, ROWS)
    tile = first_tile(weight, tl.minimum(begin + index, HEIGHT - 1), WIDTH, BLOCK, 0, 1)
    factor = first_block(norm, WIDTH, BLOCK)
    if PDL:
        cuda.gdc_wait()
    bound = tl.load(limit)
    scale = inverse_rms(x, eps, WIDTH, BLOCK)
    dtype = logits.dtype.element_ty
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    top_ids = tl.full((ROWS,), HEIGHT, tl.int32)
    for turn in tl.static_range(REPEAT):
        ids = begin + turn * ROWS + index
        rows = tl.minimum(ids, HEIGHT - 1)
        if turn > 0:
            tile = first_tile(weight, rows, WIDTH, BLOCK, 0, 1)
        out = products(
            tile, factor, weight, weight, rows, x, norm, scale, True, WIDTH, BLOCK, 0, 1
        ).to(dtype)
        tl.store(logits + ids, out, mask=ids < HEIGHT)
        value = out.to(tl.float32)
        value = tl.where(value == value, value, float("inf"))
        higher = (value > top) & (ids < bound)
        top = tl.where(higher, value, top)
        top_ids = tl.where(higher, ids, top_ids)
    highest = tl.max(top, 0)
    first = tl.min(tl.where(top == highest, top_ids, HEIGHT), 0)
    tl.store(best + tl.program_id(0), highest)
    tl.store(best_ids + tl.program_id(0), first)
