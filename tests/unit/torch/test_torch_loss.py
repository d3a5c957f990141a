"""The head's loss in slices against torch's cross-entropy of all logits at once."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.unit.torch.interpreted import run_interpreted

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_sliced_loss_and_gradients_are_those_of_whole_logits(chunk: int, frozen: bool) -> None:
    from qwen2kit_torch.train.loss import linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(9, 6, requires_grad=True)
    weight = torch.randn(20, 6, requires_grad=not frozen)
    labels = torch.randint(0, 20, (9,))
    wide, matrix = hidden.detach().double().requires_grad_(), weight.detach().double()
    matrix.requires_grad_(not frozen)
    expected = torch.nn.functional.cross_entropy(wide @ matrix.T, labels, reduction="sum")
    (expected * 0.3).backward()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, dtype=torch.float32)
    (loss * 0.3).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    assert (weight.grad is None) == frozen
    if not frozen:
        torch.testing.assert_close(weight.grad.double(), matrix.grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_products_give_float32_gradients_of_the_weight() -> None:
    from qwen2kit_torch.train.loss import linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (64,))
    wide, matrix = (t.detach().double().requires_grad_() for t in (hidden, weight))
    torch.nn.functional.cross_entropy(wide @ matrix.T, labels, reduction="sum").backward()
    linear_cross_entropy(hidden, weight, labels, chunk=16, dtype=torch.bfloat16).backward()
    assert weight.grad.dtype == torch.float32
    for narrow, exact in ((hidden.grad, wide.grad), (weight.grad, matrix.grad)):
        error = (narrow.double() - exact).norm() / exact.norm()
        assert error < 1e-2


def test_no_position_has_no_loss_and_no_gradient() -> None:
    """A process whose rows hold no label still takes part."""
    from qwen2kit_torch.train.loss import linear_cross_entropy

    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=8, dtype=torch.float32)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


KERNEL = """
import torch
from qwen2kit_torch.train.loss_kernel import Launch, cross_entropy_

torch.manual_seed(0)
for columns in (5, 1000, 40000):
    logits, labels = torch.randn(3, columns) * 5, torch.randint(0, columns, (3,))
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    expected.sum().backward()
    for launch in (Launch(), Launch(lanes=64, strips=2, warps=4, rows_in_flight=0)):
        slopes = logits.clone()
        losses = cross_entropy_(slopes, labels, slope=False, launch=launch)
        assert torch.equal(slopes, logits)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        losses = cross_entropy_(slopes, labels, slope=True, launch=launch)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slopes.double(), wide.grad, rtol=1e-4, atol=1e-7)
bad = torch.tensor([[0.0, float("nan"), 1.0]])
assert cross_entropy_(bad, torch.tensor([0]), slope=False).isnan().all()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_interpreted_kernel_is_torchs_cross_entropy() -> None:
    run_interpreted(KERNEL)
