"""Products with matrices in 4 or 8 bits, in Triton.

Codes become numbers in registers: the bits of ``2**n + code`` are those of ``2**n`` with the code
in the mantissa, so no conversion is needed, and ``2**n * sum(x)`` is taken off again for each
group. Shapes: R rows, D inputs, N rows of a matrix, a row of codes is ``PLANES = 8 / BITS`` planes
of ``D / PLANES`` bytes (`qwen2kit_torch.quantized`).
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_codes(
    codes, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The first ``BLOCK`` bytes of ``rows``, ``[rows, BLOCK / GROUP, GROUP]``."""
    SPAN: tl.constexpr = WIDTH * BITS // 8
    column = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = codes + rows[:, None, None] * SPAN + column[None, :, :]
    return tl.load(at, mask=(column < SPAN)[None, :, :], other=0, eviction_policy="evict_first")


@triton.jit
def packed_products(
    tile, codes, scales, offsets, rows, x, norm, scale,
    NORMED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """As `products.products`; ``tile`` is `first_codes`."""
    PLANES: tl.constexpr = 8 // BITS
    RAISE: tl.constexpr = 16.0 if BITS == 4 else 256.0
    SPAN: tl.constexpr = WIDTH // PLANES
    GROUPS: tl.constexpr = BLOCK // GROUP
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = codes + rows[:, None, None] * SPAN + column[None, :, :]
    total = tl.zeros((rows.shape[0], GROUPS), tl.float32)
    for start in range(0, SPAN, BLOCK):
        following = tl.load(
            at + start + BLOCK,
            mask=(start + BLOCK + column < SPAN)[None, :, :],
            other=0,
            eviction_policy="evict_first",
        )
        inside = start + column < SPAN
        known = (start + group * GROUP < SPAN)[None, :]
        for plane in tl.static_range(PLANES):
            place = plane * SPAN + start
            part = tl.load(x + place + column, mask=inside, other=0.0)
            if NORMED:
                factor = tl.load(norm + place + column, mask=inside, other=0.0)
                part = (part.to(tl.float32) * scale).to(factor.dtype) * factor
            part = part.to(tl.float32)
            cell = rows[:, None] * (WIDTH // GROUP) + (place // GROUP + group)[None, :]
            step = tl.load(scales + cell, mask=known, other=0.0).to(tl.float32)
            offset = tl.load(offsets + cell, mask=known, other=0.0).to(tl.float32)
            sums = tl.sum(_raised(tile, plane, BITS) * part[None, :, :], 2)
            whole = tl.sum(part, 1)[None, :]
            total += step * (sums - RAISE * whole) + offset * whole
        tile = following
    return tl.sum(total, 1)


@triton.jit
def _raised(tile, plane: tl.constexpr, BITS: tl.constexpr):
    """``16 + code`` of 4 bits or ``256 + code`` of 8, in float32."""
    wide = tile.to(tl.int32)
    if BITS == 8:
        bits = (wide << 15) | 0x43800000
    elif plane == 0:
        bits = ((wide & 15) << 19) | 0x41800000
    else:
        bits = ((wide & 240) << 15) | 0x41800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def packed_rows(
    x, codes, scales, offsets, bias, out, count,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out = x @ w.T + bias`` for ``x`` ``[count, D]``, a group of inputs at a time on the tensor
    cores; grid (blocks of N, blocks of rows)."""
    PLANES: tl.constexpr = 8 // BITS
    SPAN: tl.constexpr = WIDTH // PLANES
    height = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUP)
    there, mine = height < HEIGHT, row < count
    dtype = x.dtype.element_ty
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, SPAN, GROUP):
        at = codes + height[:, None] * SPAN + start + column[None, :]
        code = tl.load(at, mask=there[:, None], other=0, eviction_policy="evict_first")
        for plane in tl.static_range(PLANES):
            place = plane * SPAN + start
            part = tl.load(
                x + row[:, None] * WIDTH + place + column[None, :], mask=mine[:, None], other=0.0
            )
            cell = height * (WIDTH // GROUP) + place // GROUP
            step = tl.load(scales + cell, mask=there, other=0.0).to(tl.float32)
            offset = tl.load(offsets + cell, mask=there, other=0.0).to(tl.float32)
            # Small whole numbers, exact in every dtype.
            if BITS == 4:
                number = ((code >> (4 * plane)) & 15).to(dtype)
                offset = offset[None, :]
            else:
                number = (code.to(tl.int16) - 128).to(dtype)
                offset = (offset + 128.0 * step)[None, :]
            sums = tl.dot(part, tl.trans(number), input_precision="ieee")
            total += sums * step[None, :] + tl.sum(part.to(tl.float32), 1)[:, None] * offset
    if BIASED:
        total += tl.load(bias + height, mask=there, other=0.0).to(tl.float32)[None, :]
    place = out + row[:, None] * HEIGHT + height[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mine[:, None] & there[None, :])


@triton.jit
def expand(
    codes, scales, offsets, dense,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The dense matrix ``[N, D]``; grid (N, blocks of a row's bytes)."""
    PLANES: tl.constexpr = 8 // BITS
    SPAN: tl.constexpr = WIDTH // PLANES
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SPAN
    code = tl.load(codes + row * SPAN + column, mask=inside, other=0)
    for plane in tl.static_range(PLANES):
        place = plane * SPAN + column
        cell = row * (WIDTH // GROUP) + place // GROUP
        step = tl.load(scales + cell, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(offsets + cell, mask=inside, other=0.0).to(tl.float32)
        number = (code >> (4 * plane)) & 15 if BITS == 4 else code
        value = (number.to(tl.float32) * step + offset).to(dense.dtype.element_ty)
        tl.store(dense + row * WIDTH + place, value, mask=inside)
