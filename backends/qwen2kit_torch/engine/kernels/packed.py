"""Products with matrices in 4 or 8 bits, in Triton.

The layout of the codes (`qwen2kit_torch.quantized`) is the one in which tensor cores want them: a
lane that holds a word has all its codes where they belong, so nothing moves between lanes, and the
two halves of a word, masked and shifted, are a pair of 16-bit numbers. Codes become numbers without
a conversion: the bits of ``2**n + code`` are those of ``2**n`` with the code in the mantissa.
Shapes: R rows, D inputs, N rows of a matrix; a chunk is four words, ``128 / BITS`` codes.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Without PTX (Triton's interpreter, ROCm) pairs of numbers are scaled one by one.
_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def first_codes(codes, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The first ``BLOCK`` bytes of ``rows``, int32 ``[rows, BLOCK / 4]``."""
    WORDS: tl.constexpr = WIDTH * BITS // 32
    word = tl.arange(0, BLOCK // 4)[None, :]
    at = codes + rows[:, None] * WORDS + word
    return tl.load(at, mask=word < WORDS, other=0, eviction_policy="evict_first")


@triton.jit
def packed_products(
    tile, codes, steps, rows, x, norm, scale,
    NORMED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """As `products.products`; ``tile`` is `first_codes`."""
    WORDS: tl.constexpr = WIDTH * BITS // 32
    word = tl.arange(0, BLOCK // 4)[None, :]
    chunk = tl.arange(0, BLOCK // 16)
    at = codes + rows[:, None] * WORDS + word
    total = tl.zeros((rows.shape[0], BLOCK // 16), tl.float32)
    for start in range(0, WORDS, BLOCK // 4):
        following = tl.load(
            at + start + BLOCK // 4,
            mask=start + BLOCK // 4 + word < WORDS,
            other=0,
            eviction_policy="evict_first",
        )
        here = start // 4 + chunk
        known = here < WORDS // 4
        group = here * (128 // BITS) // GROUP
        cell = rows[:, None] * (WIDTH // GROUP) + group[None, :]
        step, offset = _pair(steps, cell, known[None, :])
        sums, whole = _chunk_sums(tile, x, norm, scale, here, known, NORMED, BITS)
        total += step.to(tl.float32) * sums + offset.to(tl.float32) * whole[None, :]
        tile = following
    return tl.sum(total, 1)


@triton.jit
def _chunk_sums(tile, x, norm, scale, chunk, known, NORMED: tl.constexpr, BITS: tl.constexpr):
    """Sums of ``code * x`` ``[rows, chunks]`` and of ``x`` ``[chunks]``."""
    COUNT: tl.constexpr = chunk.shape[0]
    word = tl.arange(0, 4)[None, :]
    sums = tl.zeros(tile.shape, tl.float32)
    raised = tl.zeros((COUNT, 4), tl.float32)
    whole = tl.zeros((COUNT, 4), tl.float32)
    for turn in tl.static_range(16 // BITS):
        pair = chunk[:, None] * (64 // BITS) + turn * 4 + word
        first, second = _pair(x, pair, known[:, None])
        if NORMED:
            one, other = _pair(norm, pair, known[:, None])
            first = (first.to(tl.float32) * scale).to(one.dtype) * one
            second = (second.to(tl.float32) * scale).to(one.dtype) * other
        first, second = first.to(tl.float32), second.to(tl.float32)
        raised += (first + second) * (256.0 if BITS == 8 or turn % 2 == 0 else 16.0)
        whole += first + second
        first, second = tl.reshape(first, (COUNT * 4,)), tl.reshape(second, (COUNT * 4,))
        sums += _raised(tile, turn * BITS, BITS) * first[None, :]
        sums += _raised(tile, turn * BITS + 16, BITS) * second[None, :]
    sums = tl.sum(tl.reshape(sums, (tile.shape[0], COUNT, 4)), 2)
    return sums - tl.sum(raised, 1)[None, :], tl.sum(whole, 1)


@triton.jit
def _pair(x, index, mask):
    """Values ``2 * index`` and ``2 * index + 1`` of a vector, zeros where not ``mask``."""
    dtype = x.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        word = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + index, mask=mask, other=0)
        first, second = _halves(word, dtype)
    else:
        first = tl.load(x + 2 * index, mask=mask, other=0.0)
        second = tl.load(x + 2 * index + 1, mask=mask, other=0.0)
    return first, second


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The low and the high half of int32 words as numbers of 16 bits."""
    low = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = ((word >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    return low, high


@triton.jit
def _raised(tile, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Codes at bit ``PLACE`` plus 256, or plus 16 for the upper of two codes of 4 bits in a byte
    (both are then where one shift brings them), in float32."""
    shift: tl.constexpr = 15 - PLACE // 8 * 8
    moved = tile << shift if shift > 0 else tile >> -shift
    if BITS == 8:
        bits = _masked_or(moved, 255 << 15, 0x43800000)
    elif PLACE % 8 == 0:
        bits = _masked_or(moved, 15 << 15, 0x43800000)
    else:
        bits = _masked_or(moved, 15 << 19, 0x41800000)
    return bits.to(tl.float32, bitcast=True)


@triton.constexpr_function
def _lop3(mask: int, bits: int) -> str:
    return f"{{ .reg .b32 bits; mov.b32 bits, {bits}; lop3.b32 $0, $1, {mask}, bits, 0xEA; }}"


@triton.jit
def _masked_or(word, MASK: tl.constexpr, BITS: tl.constexpr):
    """``(word & MASK) | BITS`` in one instruction; the compiler makes two of two literals."""
    if _PTX:
        asm: tl.constexpr = _lop3(MASK, BITS)
        return tl.inline_asm_elementwise(asm, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (word & MASK) | BITS


@triton.jit
def packed_rows(
    x, codes, steps, bias, out, parts, arrived, count,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out = x @ w.T + bias`` on the tensor cores for ``x`` ``[count, D]``, up to ``ROWS`` rows;
    grid (blocks of N, SPLITS).

    Weights are rounded to the dtype of ``x`` as `expand` does. Each program takes a range of the
    inputs, ``SPAN`` at a time (a divisor of D), and the last one of a block of N adds up what the
    ranges gave, in order.

    Args:
        parts: float32 ``[blocks, SPLITS, BLOCK, ROWS]``.
        arrived: int32 ``[blocks]``, zeros; left as zeros.
    """
    TURNS: tl.constexpr = WIDTH // SPAN
    block, split = tl.program_id(0), tl.program_id(1)
    height = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    mine = tl.minimum(height, HEIGHT - 1)
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    begin, end = split * TURNS // SPLITS, (split + 1) * TURNS // SPLITS
    for turn in tl.range(begin, end, num_stages=STAGES):
        values = _scaled_tile(
            codes, steps, mine, turn, x.dtype.element_ty, WIDTH, SPAN, BITS, GROUP
        )
        at = x + row[None, :] * WIDTH + turn * SPAN + column[:, None]
        part = tl.load(at, mask=(row < count)[None, :], other=0.0)
        total = tl.dot(values, part, total, input_precision="ieee")
    last = True
    if SPLITS > 1:
        cell = tl.arange(0, BLOCK)[:, None] * ROWS + row[None, :]
        base = parts + block * (SPLITS * BLOCK * ROWS)
        tl.store(base + split * (BLOCK * ROWS) + cell, total)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLITS - 1
        tl.debug_barrier()
        if last:
            tl.store(arrived + block, 0)
            total = tl.zeros((BLOCK, ROWS), tl.float32)
            for index in range(SPLITS):
                total += tl.load(base + index * (BLOCK * ROWS) + cell, cache_modifier=".cg")
    if last:
        if BIASED:
            total += tl.load(bias + mine).to(tl.float32)[:, None]
        place = out + row[None, :] * HEIGHT + height[:, None]
        kept = (height < HEIGHT)[:, None] & (row < count)[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _scaled_tile(
    codes, steps, rows, turn, dtype: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weights ``[rows, SPAN]`` from column ``turn * SPAN``, in ``dtype``."""
    GROUPS: tl.constexpr = (SPAN + GROUP - 1) // GROUP
    WORDS: tl.constexpr = SPAN * BITS // 32 // GROUPS
    word = turn * (GROUPS * WORDS) + tl.arange(0, GROUPS * WORDS)
    at = codes + rows[:, None] * (WIDTH * BITS // 32) + word[None, :]
    tile = tl.reshape(tl.load(at, eviction_policy="evict_first"), (rows.shape[0], GROUPS, WORDS))
    group = turn * SPAN // GROUP + tl.arange(0, GROUPS)
    cell = rows[:, None] * (WIDTH // GROUP) + group[None, :]
    step, offset = _steps(steps, cell, dtype)
    first = _scaled_pair(tile, step, offset, 0, dtype, BITS)
    second = _scaled_pair(tile, step, offset, BITS, dtype, BITS)
    if BITS == 8:
        joint = tl.reshape(tl.join(first, second), (rows.shape[0], SPAN // 16, 4, 2, 2))
        joint = tl.permute(joint, (0, 1, 4, 2, 3))
    else:
        third = _scaled_pair(tile, step, offset, 8, dtype, BITS)
        fourth = _scaled_pair(tile, step, offset, 12, dtype, BITS)
        joint = tl.join(tl.join(first, second), tl.join(third, fourth))
        joint = tl.reshape(joint, (rows.shape[0], SPAN // 32, 4, 2, 2, 2))
        joint = tl.permute(joint, (0, 1, 5, 4, 2, 3))
    return tl.reshape(joint, (rows.shape[0], SPAN))


@triton.jit
def _steps(steps, cell, dtype: tl.constexpr):
    """Scale and offset of groups ``[..., 1]``: in both halves of an int32 for `_times_plus`, which
    takes those of ``dtype``, else in float32."""
    kind = steps.dtype.element_ty
    if _PTX and dtype.primitive_bitwidth == 16 and kind == dtype:
        word = tl.load(steps.to(tl.pointer_type(tl.int32), bitcast=True) + cell)
        low, high = word & 0xFFFF, (word >> 16) & 0xFFFF
        step, offset = low | (low << 16), high | (high << 16)
    else:
        step, offset = _pair(steps, cell, cell >= 0)
        step, offset = step.to(tl.float32), offset.to(tl.float32)
    return tl.expand_dims(step, -1), tl.expand_dims(offset, -1)


@triton.jit
def _scaled_pair(tile, step, offset, PLACE: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr):
    """``code * step + offset`` of the codes at bit ``PLACE`` of both halves, ``[..., 2]``."""
    if step.dtype == tl.int32:
        if BITS == 4:
            pair = _times_plus(_lifted(tile, PLACE, dtype, False), step, offset, dtype)
        else:
            low = _lifted(tile, PLACE, dtype, False)
            pair = _sum_times_plus(low, _lifted(tile, PLACE + 4, dtype, True), step, offset, dtype)
        first, second = _halves(pair, dtype)
    else:
        first = _number(tile, PLACE, BITS) * step + offset
        second = _number(tile, PLACE + 16, BITS) * step + offset
    return tl.join(first.to(dtype), second.to(dtype))


@triton.jit
def _number(tile, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Codes at bit ``PLACE`` in float32."""
    bits = ((tile >> PLACE) & ((1 << BITS) - 1)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _lifted(tile, PLACE: tl.constexpr, dtype: tl.constexpr, HIGH: tl.constexpr):
    """Four bits from ``PLACE`` of both halves as a pair of numbers plus a power of two; they count
    sixteenfold if ``HIGH``."""
    once: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    sixteenfold: tl.constexpr = 0x45004500 if dtype == tl.bfloat16 else 0x74007400
    return _masked_or(tile >> PLACE, 0x000F000F, sixteenfold if HIGH else once)


@triton.jit
def _times_plus(lifted, step, offset, dtype: tl.constexpr):
    """Pairs of ``code * step + offset``, rounded once."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 one, less, code; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC300C300;
            fma.rn.bf16x2 code, $1, one, less; fma.rn.bf16x2 $0, code, $2, $3; }""",
            "=r,r,r,r", [lifted, step, offset], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 one, less, code; mov.b32 one, 0x3C003C00; mov.b32 less, 0xE400E400;
            fma.rn.f16x2 code, $1, one, less; fma.rn.f16x2 $0, code, $2, $3; }""",
            "=r,r,r,r", [lifted, step, offset], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _sum_times_plus(low, high, step, offset, dtype: tl.constexpr):
    """The same for codes of two parts: exact in bfloat16 too, as they are below 256."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 one, less, code; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC508C508;
            fma.rn.bf16x2 code, $2, one, less; fma.rn.bf16x2 code, $1, one, code;
            fma.rn.bf16x2 $0, code, $3, $4; }""",
            "=r,r,r,r,r", [low, high, step, offset], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 one, less, code; mov.b32 one, 0x3C003C00; mov.b32 less, 0xF440F440;
            fma.rn.f16x2 code, $2, one, less; fma.rn.f16x2 code, $1, one, code;
            fma.rn.f16x2 $0, code, $3, $4; }""",
            "=r,r,r,r,r", [low, high, step, offset], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def expand(
    codes, steps, dense,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The dense matrix ``[N, D]``; grid (N, blocks of a row's bytes)."""
    CHUNKS: tl.constexpr = WIDTH * BITS // 128
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
    word, half = tl.arange(0, 4)[None, :], tl.arange(0, 2)[None, None, :]
    inside = chunk < CHUNKS
    tile = tl.load(
        codes + row * (CHUNKS * 4) + chunk[:, None] * 4 + word, mask=inside[:, None], other=0
    )
    cell = row * (WIDTH // GROUP) + chunk * (128 // BITS) // GROUP
    step, offset = _pair(steps, cell, inside)
    step, offset = step.to(tl.float32)[:, None], offset.to(tl.float32)[:, None]
    for turn in tl.static_range(16 // BITS):
        pair = _scaled_pair(tile, step, offset, turn * BITS, dense.dtype.element_ty, BITS)
        column = (chunk[:, None] * (128 // BITS) + turn * 8 + word * 2)[:, :, None] + half
        tl.store(dense + row * WIDTH + column, pair, mask=inside[:, None, None])
