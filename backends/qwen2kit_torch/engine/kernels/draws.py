"""The canonical draw from rows of logits (`qwen2kit.generate.whole_row`) in Triton.

The weights of a row, relative to its best score, are added up in buckets of scores; what a sum of
weights reaches is then looked for among the scores of one bucket, by halving. Sums are float64.

Shapes: N rows, V vocabulary, S parts of a row, `BUCKETS`.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from qwen2kit_torch.engine.kernels.rows import go_on

BUCKETS = 4096
# 64 for every unit below the best score up to 48, then 4.
_FINE = tl.constexpr(64.0)
_FINE_END = tl.constexpr(48.0)
_COARSE = tl.constexpr(4.0)
_COARSE_START = tl.constexpr(3072.0)
_LAST = tl.constexpr(BUCKETS - 1)
_COUNT = tl.constexpr(BUCKETS)
_NOTHING = tl.constexpr(1e-25)  # a weight that no sum feels
MOST_PARTS = 128
_SPAN = tl.constexpr(MOST_PARTS)


@triton.jit
def scores_of(
    logits, said, rules, column, limit, HEIGHT: tl.constexpr, PENALISED: tl.constexpr
):  # fmt: skip
    """float32 scores of some columns of a row, without -0.0; -inf for those that are out.

    If ``PENALISED``, penalties for what was said are taken off first, each operation rounded to
    float32 as on a host. ``said`` int16 ``[V]``: how often, times two, and one if the repetition
    penalty counts it; ``rules`` float64: repetition, presence and frequency penalty.
    """
    inside = (column < HEIGHT) & (column < limit)
    found = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
    if PENALISED:
        told = tl.load(said + column, mask=inside, other=0).to(tl.int32)
        repetition = tl.load(rules).to(tl.float32)
        divided = tl.math.div_rn(found, tl.full(found.shape, 1.0, tl.float32) * repetition)
        repeated = tl.where(found > 0, divided, found * repetition)
        found = tl.where(told % 2 == 1, repeated, found)
        times = (told // 2).to(tl.float64)
        penalty = (tl.load(rules + 1) + times * tl.load(rules + 2)).to(tl.float32)
        found = tl.where(told > 1, found - penalty, found)
    return tl.where(found == 0, 0.0, found)


@triton.jit
def bucket_of(best, score):
    """int32, rising as scores fall."""
    gap = tl.minimum(best - score, 1024.0)
    fine = (gap * _FINE).to(tl.int32)
    coarse = ((gap - _FINE_END) * _COARSE + _COARSE_START).to(tl.int32)
    return tl.where(gap < _FINE_END, fine, tl.minimum(coarse, _LAST))


@triton.jit
def key_of(score):
    """int32 that orders as scores do; its own inverse."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weight_of(score, best, temperature):
    """float64."""
    return tl.exp((score - best).to(tl.float64) / temperature)


@triton.jit
def highest(peaks, row, parts):
    """The best score of a row from those of its parts."""
    part = tl.arange(0, _SPAN)
    return tl.max(tl.load(peaks + row * parts + part, mask=part < parts, other=-float("inf")), 0)


@triton.jit(do_not_specialize=["parts", "width"])
def find_peaks(
    logits, said, rules, limits, peaks, parts, width,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """The best score of every part of ``width`` columns, +inf where there is NaN. Grid (S, N)."""
    part, row = tl.program_id(0), tl.program_id(1)
    limit, first = tl.load(limits + row), row.to(tl.int64) * HEIGHT
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(part * width, (part + 1) * width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score = scores_of(
            logits + first, said + first, rules + 3 * row, column, limit, HEIGHT, PENALISED
        )
        best = tl.maximum(best, tl.where(score == score, score, float("inf")))
    tl.store(peaks + row * parts + part, tl.max(best, 0))


@triton.jit(do_not_specialize=["parts", "width"])
def weigh(
    logits, said, rules, limits, temperatures, peaks, weights, counts, parts, width,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, COUNTS: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """Add up weights, and count scores if ``COUNTS``, in ``[N, BUCKETS]`` of zeros. Grid (S, N)."""
    part, row = tl.program_id(0), tl.program_id(1)
    limit, temperature = tl.load(limits + row), tl.load(temperatures + row)
    first = row.to(tl.int64) * HEIGHT
    best = highest(peaks, row, parts)
    if (best > -float("inf")) & (best < float("inf")):
        for start in range(part * width, (part + 1) * width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            score = scores_of(
                logits + first, said + first, rules + 3 * row, column, limit, HEIGHT, PENALISED
            )
            weight = weight_of(score, best, temperature)
            place = row * _COUNT + bucket_of(best, score)
            own = score > -float("inf")
            tl.atomic_add(weights + place, weight, mask=own & (weight > _NOTHING), sem="relaxed")
            if COUNTS:
                tl.atomic_add(counts + place, 1, mask=own, sem="relaxed")


@triton.jit
def gather(
    logits, said, rules, limit, best, bucket, keys, ids,
    HEIGHT: tl.constexpr, PENALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and ids of a bucket, by rising id; their number, the least and the greatest key."""
    count = 0
    least = tl.full((BLOCK,), 2147483647, tl.int32)
    most = tl.full((BLOCK,), -2147483648, tl.int32)
    tl.debug_barrier()
    for start in range(0, HEIGHT, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score = scores_of(logits, said, rules, column, limit, HEIGHT, PENALISED)
        own = (score > -float("inf")) & (bucket_of(best, score) == bucket)
        key = key_of(score)
        one = own.to(tl.int32)
        place = count + tl.cumsum(one, 0) - 1
        tl.store(keys + place, key, mask=own)
        tl.store(ids + place, column, mask=own)
        least = tl.minimum(least, tl.where(own, key, 2147483647))
        most = tl.maximum(most, tl.where(own, key, -2147483648))
        count += tl.sum(one, 0)
    tl.debug_barrier()
    return count, tl.min(least, 0), tl.max(most, 0)


@triton.jit
def from_key_on(keys, count, key, best, temperature, BLOCK: tl.constexpr):
    """Sum of weights, and number, of what has ``key`` or a greater one."""
    weight = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.load(keys + at, mask=at < count, other=-2147483648)
        own = (at < count) & (found >= key)
        score = key_of(found).to(tl.float32, bitcast=True)
        weight += tl.where(own, weight_of(score, best, temperature), 0.0)
        number += own.to(tl.int32)
    return tl.sum(weight, 0), tl.sum(number, 0)


@triton.jit
def key_that_reaches(
    keys, count, least, most, before, value, best, temperature,
    NUMBER: tl.constexpr, BEYOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest key from which on the sum (the number, if ``NUMBER``), ``before`` included, is
    at least ``value``, or above it if ``BEYOND``; the least key if there is none."""
    low, high = least.to(tl.int64), most.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        weight, number = from_key_on(
            keys, count, middle.to(tl.int32), best, temperature, BLOCK
        )  # fmt: skip
        total = before + weight
        if NUMBER:
            total = before + number
        enough = total >= value
        if BEYOND:
            enough = total > value
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def id_of(keys, ids, count, key, rank, BLOCK: tl.constexpr):
    """The id of the ``rank``-th entry with ``key``."""
    before = 0
    found = 0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = ((at < count) & (tl.load(keys + at, mask=at < count, other=0) == key)).to(tl.int32)
        place = before + tl.cumsum(own, 0) - 1
        hit = (own == 1) & (place == rank)
        found += tl.sum(tl.where(hit, tl.load(ids + at, mask=at < count, other=0), 0), 0)
        before += tl.sum(own, 0)
    return found


@triton.jit
def reach(
    logits, said, rules, limit, best, temperature, share, value, keys, ids,
    bucket, count, least, most, HEIGHT: tl.constexpr, PENALISED: tl.constexpr,
    BEYOND: tl.constexpr, SCAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the sum of weights reaches ``value`` (see `key_that_reaches`).

    Returns the key, which of its equals it is, the sum up to and with it, and what is gathered:
    bucket, number, least and greatest key.
    """
    index = tl.arange(0, _COUNT)
    sums = tl.cumsum(share, 0)
    short = sums < value
    if BEYOND:
        short = sums <= value
    full = tl.max(tl.where(share > 0, index, 0), 0)
    wanted = tl.minimum(tl.sum(short.to(tl.int32), 0), full)
    if wanted != bucket:
        count, least, most = gather(
            logits, said, rules, limit, best, wanted, keys, ids, HEIGHT, PENALISED, SCAN
        )
    before = tl.sum(tl.where(index < wanted, share, 0.0), 0)
    key = key_that_reaches(
        keys, count, least, most, before, value, best, temperature, False, BEYOND, BLOCK
    )
    weight, number = from_key_on(keys, count, key, best, temperature, BLOCK)
    one = weight_of(key_of(key).to(tl.float32, bitcast=True), best, temperature)
    _, above = from_key_on(keys, count, key + 1, best, temperature, BLOCK)
    equals = (number - above).to(tl.float64)
    start = before + weight - equals * one
    steps = (value - start) / tl.maximum(one, 1e-300)
    rank = tl.floor(steps) if BEYOND else tl.ceil(steps) - 1
    rank = tl.minimum(tl.maximum(rank, 0.0), equals - 1)
    return key, rank.to(tl.int32), start + (rank + 1) * one, wanted, count, least, most


@triton.jit(do_not_specialize=["parts"])
def draw(
    logits, said, rules, limits, temperatures, top_k, top_p, points, step, peaks, weights, counts,
    keys, ids, drawn, parts, HEIGHT: tl.constexpr, SCAN: tl.constexpr, BLOCK: tl.constexpr,
    COUNTS: tl.constexpr, PENALISED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Ids ``[N]``, -1 where a row has NaN, +inf, or nothing finite. Grid (N,).

    ``keys`` and ``ids`` are scratch ``[N, V]``. ``SCAN`` columns are looked through at a time for
    what is in a bucket. ``COUNTS``: some row has a top-k. ``points`` are ``[N, STEPS]``, taken in
    turn as ``step`` counts from 1.
    """
    row = tl.program_id(0)
    best = highest(peaks, row, parts)
    if (best == -float("inf")) | (best == float("inf")):
        tl.store(drawn + row, -1)
    else:
        first = row.to(tl.int64) * HEIGHT
        logits, said, keys, ids = logits + first, said + first, keys + first, ids + first
        rules += 3 * row
        limit, temperature = tl.load(limits + row), tl.load(temperatures + row)
        index = tl.arange(0, _COUNT)
        share = tl.load(weights + row * _COUNT + index)
        mass = tl.sum(share, 0)
        bucket, count, least, most = -1, 0, 0, 0
        if COUNTS:
            kept = tl.load(top_k + row)
            number = tl.load(counts + row * _COUNT + index)
            if (kept > 0) & (kept < tl.sum(number, 0)):
                bucket = tl.sum((tl.cumsum(number, 0) < kept).to(tl.int32), 0)
                count, least, most = gather(
                    logits, said, rules, limit, best, bucket, keys, ids, HEIGHT, PENALISED, SCAN
                )
                before = tl.sum(tl.where(index < bucket, number, 0), 0)
                key = key_that_reaches(
                    keys, count, least, most, before, kept, best, temperature, True, False, BLOCK
                )
                weight, _ = from_key_on(keys, count, key, best, temperature, BLOCK)
                mass = tl.sum(tl.where(index < bucket, share, 0.0), 0) + weight
        part = tl.load(top_p + row)
        if part < 1:
            _, _, mass, bucket, count, least, most = reach(
                logits, said, rules, limit, best, temperature, share, part * mass, keys, ids,
                bucket, count, least, most, HEIGHT, PENALISED, False, SCAN, BLOCK,
            )  # fmt: skip
        point = tl.load(points + row * STEPS + (tl.load(step) - 1) % STEPS)
        key, rank, _, bucket, count, least, most = reach(
            logits, said, rules, limit, best, temperature, share, point * mass, keys, ids,
            bucket, count, least, most, HEIGHT, PENALISED, True, SCAN, BLOCK,
        )  # fmt: skip
        tl.store(drawn + row, id_of(keys, ids, count, key, rank, BLOCK))


@triton.jit
def advance(
    drawn, slots, positions, tokens, history, step, said,
    ROWS: tl.constexpr, STEPS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Drawn ids become the rows' next tokens, and are said; positions grow. Grid (R,).

    ``history`` ``[STEPS, R]`` keeps the ids, -1 where there were none.
    """
    row = tl.program_id(0)
    token = tl.load(drawn + row)
    go_on(row, token, slots, positions, tokens, history, step, ROWS, STEPS)
    if token >= 0:
        place = said + row.to(tl.int64) * HEIGHT + token
        told = tl.load(place).to(tl.int32)
        tl.store(place, tl.where(told < 32000, (told | 1) + 2, told).to(tl.int16))
