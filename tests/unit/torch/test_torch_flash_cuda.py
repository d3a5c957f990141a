"""On a Hopper or Blackwell GPU with flash-attn-4: results beside those of torch in float64."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
_FITS = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not _FITS, reason="needs a GPU of capability 9 or 10"),
    pytest.mark.skipif(
        find_spec("flash_attn") is None, reason="needs flash-attn-4: pip install 'qwen2kit[hopper]'"
    ),
]

HEADS = {"14 over 2 of 64": (14, 2, 64), "12 over 2 of 128": (12, 2, 128), "4 of 96": (4, 4, 96)}
WINDOWS = (None, 1, 100)


def tensors(counts: tuple[int, int, int], queries: Any, keys: Any) -> list[Any]:
    """Random bfloat16 queries, keys and values ``[*shape, heads, C]``."""
    heads, kv_heads, width = counts
    shapes = ((*queries, heads, width), *[(*keys, kv_heads, width)] * 2)
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


def reference(q: Any, k: Any, v: Any, window: int | None) -> Any:
    """torch's attention of ``[B, T, heads, C]`` in float64, aligned at the end."""
    queries = torch.arange(q.shape[1], device="cuda")[:, None] + k.shape[1] - q.shape[1]
    distance = queries - torch.arange(k.shape[1], device="cuda")
    mask = (distance >= 0) & (distance < (window or k.shape[1]))
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return out.transpose(1, 2)


def assert_near(found: Any, theirs: Any, inputs: list[Any]) -> None:
    """Values and gradients within what bfloat16 leaves of them."""
    slope = torch.randn_like(found)
    ours = (found, *torch.autograd.grad(found, inputs, slope))
    exact = (theirs, *torch.autograd.grad(theirs, inputs, slope.double()))
    for name, near, true in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        # A query that sees one key has no gradient.
        off = (near.double() - true).norm() / (true.norm() + 0.01 * slope.norm())
        assert off < 1e-2, f"{name}: relative error {off:.1e}"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 300, 1024])
@pytest.mark.parametrize("name", HEADS)
def test_whole_rows(name: str, length: int, window: int | None) -> None:
    from qwen2kit_torch.fused.flash import flash_attention

    torch.manual_seed(0)
    inputs = tensors(HEADS[name], (2, length), (2, length))
    found = flash_attention(*inputs, window=window)
    assert found.is_contiguous()
    assert_near(found, reference(*inputs, window), inputs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("further", [False, True], ids=["as many keys", "more keys"])
@pytest.mark.parametrize("empty", [3, 300])
@pytest.mark.parametrize("name", HEADS)
def test_segments(name: str, empty: int, further: bool, window: int | None) -> None:
    """Of many lengths, with keys before the queries, and empty ones behind."""
    from qwen2kit_torch.fused.flash import flash_attention

    torch.manual_seed(0)
    lengths = [1, 130, 77, 512, 5]
    more = [0, 300, 0, 513, 1] if further else [0] * 5
    ends = [
        np.cumsum([0, *each, *[0] * empty]) for each in (lengths, np.add(lengths, more).tolist())
    ]
    q, k, v = inputs = tensors(HEADS[name], (int(ends[0][-1]),), (int(ends[1][-1]),))
    starts = tuple(torch.tensor(e, dtype=torch.int32, device="cuda") for e in ends)
    found = flash_attention(q, k, v, starts=starts, longest=2048, window=window)
    slices = [[slice(*pair) for pair in pairwise(each.tolist())] for each in ends]
    parts = [
        reference(q[None, here], k[None, there], v[None, there], window)[0]
        for here, there in list(zip(*slices, strict=True))[:5]
    ]
    assert_near(found, torch.cat(parts), inputs)


@pytest.mark.parametrize("window", [None, 100])
def test_compiled_is_eager_without_copies(window: int | None) -> None:
    from qwen2kit_torch.train.flash import FlashAttend

    torch.manual_seed(0)
    inputs = tensors(HEADS["14 over 2 of 64"], (2, 640), (2, 640))
    slope = torch.randn(2, 640, 14 * 64, device="cuda", dtype=torch.bfloat16)

    def run(attend: Any) -> list[Any]:
        out = attend(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2).flatten(2)
        return [out, *torch.autograd.grad(out, inputs, slope)]

    attend = FlashAttend(window)
    torch.use_deterministic_algorithms(True)
    try:
        for eager, compiled in zip(
            run(attend), run(torch.compile(attend, fullgraph=True)), strict=True
        ):
            assert eager.is_contiguous()
            assert compiled.is_contiguous()
            assert torch.equal(eager, compiled)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", HEADS)
def test_runs_are_equal_where_torch_is_told_so(name: str) -> None:
    from qwen2kit_torch.fused.flash import flash_attention

    torch.manual_seed(0)
    inputs = tensors(HEADS[name], (4, 2048), (4, 2048))
    slope = torch.randn_like(inputs[0])
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (
            torch.autograd.grad(flash_attention(*inputs), inputs, slope) for _ in range(5)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("recompute", "packed", "window"),
    [("none", False, None), ("none", True, None), ("selective", True, 7), ("full", False, 7)],
)
def test_training_follows_eager_float32(
    recompute: str, packed: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.parallel import curves

    spec_of = curves.spec_of
    monkeypatch.setattr(curves, "spec_of", lambda case: replace(spec_of(case), head_dim=64))
    case = curves.Case(tied=True, packed=packed, window=window, steps=10)
    expected, held_out, _ = curves.train_on(case, "cuda", "float32", compile=False)
    plan: dict[str, Any] = {"attention": "flash-attn-4", "recompute": recompute}
    curve, held, _ = curves.train_on(case, "cuda", "bfloat16", compile=True, **plan)
    ours, theirs = np.array(curve)[:, 0], np.array(expected)[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-2)
    assert held == pytest.approx(held_out, rel=1e-2)
