"""What only runs on a CUDA device: the loss kernel, variable-length attention, compiled layers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("columns", [1000, 8192, 151936])
def test_the_loss_kernel_is_torchs_cross_entropy_and_its_gradient(columns: int) -> None:
    from qwen2kit_torch.train.loss_kernel import cross_entropy_

    torch.manual_seed(0)
    logits = (torch.randn(37, columns, device="cuda") * 5).bfloat16()
    labels = torch.randint(0, columns, (37,), device="cuda")
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    expected.sum().backward()
    losses = cross_entropy_(logits, labels, slope=True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), wide.grad, rtol=1e-2, atol=1e-6)


def test_the_loss_kernel_keeps_the_logits_without_a_gradient() -> None:
    from qwen2kit_torch.train.loss_kernel import cross_entropy_

    logits = torch.randn(5, 300, device="cuda").bfloat16()
    before = logits.clone()
    cross_entropy_(logits, torch.arange(5, device="cuda"), slope=False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("cp", [1, 2])
def test_segments_are_masks(window: int | None, cp: int) -> None:
    from qwen2kit_torch.parallel.context import chunks_of, gathered_positions, positions_of
    from qwen2kit_torch.train.segments import VarlenAttend, segments

    rng = np.random.default_rng(0)
    rows, length = 3, 64
    documents = np.sort(rng.integers(0, 5, (rows, length)), axis=1).astype(np.int32)
    documents[1, 40:] = -1
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(rows, heads, length, 32, device="cuda").bfloat16() for heads in (4, 2, 2)
    )
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (documents[:, :, None] == documents[:, None, :])
    if window is not None:
        seen &= distance < window
    mask = torch.from_numpy(seen[:, None]).cuda()
    whole = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True
    )
    order = gathered_positions(cp, length)
    for rank in range(cp):
        here = positions_of(rank, cp, length)
        count = 1 if cp == 1 else 2 * cp
        found = segments(documents, chunks_of(rank, cp), count, order)
        attend = VarlenAttend(
            torch.from_numpy(found.query_starts).cuda(),
            torch.from_numpy(found.key_starts).cuda(),
            None if found.keys is None else torch.from_numpy(found.keys).cuda(),
            length,
            window,
        )
        index = torch.from_numpy(order).cuda()
        out = attend(q[:, :, torch.from_numpy(here).cuda()], k[:, :, index], v[:, :, index])
        expected = whole[:, :, torch.from_numpy(here).cuda()]
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_bfloat16_follows_eager_float32(recompute: str, packed: bool) -> None:
    from tests.parallel.curves import Case, train_on

    case = Case(tied=True, packed=packed, steps=10)
    expected, held_out, _ = train_on(case, "cuda", "float32", compile=False)
    curve, held, _ = train_on(case, "cuda", "bfloat16", compile=True, recompute=recompute)
    ours, theirs = np.array(curve)[:, 0], np.array(expected)[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-2)
    assert held == pytest.approx(held_out, rel=1e-2)
