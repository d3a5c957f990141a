"""Rotation of heads and their division or joining, in Triton: everything is read and written once.

Per token 2 * (H + 2 K) * C values pass, and the tables, which all heads share, stay in cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 64


def divide(joint: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> None:
    """Fill ``parts`` (queries, keys, values) from ``joint``; see `rotated_heads` for shapes."""
    _launch(joint, parts, cos, sin, back=False)


def join(joint: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> None:
    """Fill ``joint`` from ``parts``, queries and keys rotated back."""
    _launch(joint, parts, cos, sin, back=True)


def _launch(
    joint: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, back: bool
) -> None:
    query, key, value = parts
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    tensors = (joint, query, key, value, cos, sin)
    assert all(tensor.is_contiguous() for tensor in tensors)
    _kernel[(heads + 2 * kv_heads, triton.cdiv(batch * length, _TOKENS))](
        *tensors,
        batch * length,
        len(cos),
        heads,
        kv_heads,
        WIDTH=width,
        LANES=triton.next_power_of_2(width // 2),
        TOKENS=_TOKENS,
        BACK=back,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    joint, query, key, value, cos, sin, tokens, table_rows, heads, kv_heads,
    WIDTH: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    half: tl.constexpr = WIDTH // 2
    inside = (token < tokens)[:, None] & (lane < half)[None, :]
    if head < heads:
        part = query + (token * heads + head) * WIDTH
    elif head < heads + kv_heads:
        part = key + (token * kv_heads + head - heads) * WIDTH
    else:
        part = value + (token * kv_heads + head - heads - kv_heads) * WIDTH
    place = joint + (token * (heads + 2 * kv_heads) + head) * WIDTH
    if BACK:
        source, target = part, place
    else:
        source, target = place, part
    source = source[:, None] + lane[None, :]
    target = target[:, None] + lane[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        angle = ((token % table_rows) * WIDTH)[:, None] + lane[None, :]
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    kind = joint.dtype.element_ty
    tl.store(target, first.to(kind), mask=inside)
    tl.store(target + half, second.to(kind), mask=inside)
