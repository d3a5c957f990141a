"""Triton kernels for matrices in 4 and 8 bits against the expanded matrices
(`test_torch_interpreted`)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import small_spec
from tests.unit.torch.peers import TOKENS, ours
from tests.unit.torch.stepped import Stepped

torch = pytest.importorskip("torch")
pytest.importorskip("triton")


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_kernels_compute_what_the_expanded_matrix_does(bits: int, group: int) -> None:
    from qwen2kit_torch.engine.packed_products import dequantize, product
    from qwen2kit_torch.quantized import quantize

    torch.manual_seed(0)
    matrix = quantize(torch.randn(70, 256), bits=bits, group=group)
    dense = matrix.dense(torch.float32)
    torch.testing.assert_close(dequantize(matrix, torch.float32), dense)
    for rows in (2, 17, 65, 193):
        x, bias = torch.randn(rows, 256), torch.randn(70)
        added = None if rows == 17 else bias
        out = torch.empty(rows, 70)
        product(x, matrix, out, added)
        expected = torch.nn.functional.linear(x, dense, added)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 128)])
def test_numbers_of_16_bits_are_read_in_pairs(bits: int, group: int) -> None:
    from qwen2kit_torch.engine.packed_products import packed_rows, scratch_for
    from qwen2kit_torch.engine.tuning import RowsTile
    from qwen2kit_torch.quantized import quantize

    torch.manual_seed(0)
    matrix = quantize(torch.randn(40, 512).half(), bits=bits, group=group)
    x, out = torch.randn(3, 512).half(), torch.empty(3, 40).half()
    tile = RowsTile(rows=16, block=32, span=64, splits=3, warps=4, stages=2)
    scratch = scratch_for([matrix], 3, 2, tile)
    packed_rows(x, matrix, out, None, scratch, tile)
    expected = x.float() @ matrix.dense(torch.float16).float().t()
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=1e-3)
    assert scratch is not None
    assert not scratch.arrived.any()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_a_step_of_one_row_reads_packed_weights(bits: int, group: int) -> None:
    # The interpreter takes 20 ms for every row of a matrix.
    spec = small_spec(hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    model = ours(spec, weight_bits=bits, weight_group_size=group)
    expected = model.logits(TOKENS)
    slots = Stepped(model, 1, 32, 1)
    for position in range(2):
        found = slots.run([(TOKENS[position], 0, position)])
        np.testing.assert_allclose(found[0], expected[position], atol=1e-4)
